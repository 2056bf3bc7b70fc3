"""One live line per step; the commands' own output goes to the log file."""

import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

REDRAW_SECONDS = 0.5
HEARTBEAT_SECONDS = 30.0
TAIL_LINES = 25


class SetupError(Exception):
    """A step did not finish: what failed, and what the user can do about it."""

    def __init__(self, what: str, remedy: str) -> None:
        super().__init__(what)
        self.remedy = remedy


class Steps:
    """Runs commands one after another, showing elapsed seconds: one redrawn line on a terminal, else plain lines."""

    def __init__(self, log_path: Path) -> None:
        self._log_path = log_path
        self._live = sys.stdout.isatty() and not os.environ.get("CI")

    def run(
        self, title: str, commands: Sequence[Sequence[str]], remedy: str, env: dict[str, str] | None = None
    ) -> None:
        """Run `commands` in order as one step.

        Raises:
            SetupError: a command ended with a status other than 0.
        """
        started = time.monotonic()
        if not self._live:
            print(f"  {title} ...", flush=True)
        for command in commands:
            self._run_one(title, command, started, remedy, env)
        self._show(f"  {title}: done in {time.monotonic() - started:.0f} s", last=True)

    def _run_one(
        self, title: str, command: Sequence[str], started: float, remedy: str, env: dict[str, str] | None
    ) -> None:
        with self._log_path.open("a") as log:
            log.write(f"\n$ {' '.join(command)}\n")
            log.flush()
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, **(env or {})},
            )
            try:
                status = self._wait(process, title, started)
            except BaseException:
                process.terminate()
                process.wait()
                raise
        if status != 0:
            self._show(f"  {title}: FAILED after {time.monotonic() - started:.0f} s", last=True)
            raise SetupError(f"`{' '.join(command[:4])} ...` ended with status {status}", remedy)

    def _wait(self, process: subprocess.Popen[bytes], title: str, started: float) -> int:
        heartbeat = time.monotonic() + HEARTBEAT_SECONDS
        while True:
            try:
                return process.wait(timeout=REDRAW_SECONDS)
            except subprocess.TimeoutExpired:
                elapsed = time.monotonic() - started
            if self._live:
                self._show(f"  {title} {elapsed:4.0f} s  {self._last_log_line()}", last=False)
            elif time.monotonic() >= heartbeat:
                heartbeat += HEARTBEAT_SECONDS
                print(f"  {title} ... {elapsed:.0f} s", flush=True)

    def _last_log_line(self) -> str:
        lines = log_tail(self._log_path, 1)
        return lines[0].strip() if lines else ""

    def _show(self, text: str, *, last: bool) -> None:
        if not self._live:
            print(text, flush=True)
            return
        width = os.get_terminal_size(sys.stdout.fileno()).columns - 1
        sys.stdout.write("\r\x1b[K" + text[:width] + ("\n" if last else ""))
        sys.stdout.flush()


def log_tail(path: Path, lines: int = TAIL_LINES) -> list[str]:
    """The last `lines` non-empty lines of a log; carriage returns of progress bars count as line ends."""
    if not path.is_file():
        return []
    with path.open("rb") as log:
        log.seek(max(0, path.stat().st_size - 16384))
        text = log.read().decode(errors="replace").replace("\r", "\n")
    return [line for line in text.splitlines() if line.strip()][-lines:]
