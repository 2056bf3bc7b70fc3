"""A command with a limit on its time: what hangs or crashes is reported, and the check goes on."""

import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

# A process that the driver holds may not die even of this; it is left behind then.
KILL_S = 10.0


@dataclass(frozen=True)
class Ended:
    """How a command ended.

    Attributes:
        status: its exit status, negative for a signal; none: out of time.
        output: its standard output.
        last_words: the last line it wrote to standard error, which was passed on as it came.
        seconds: how long it took.
    """

    status: int | None
    output: str
    last_words: str
    seconds: float

    @property
    def ok(self) -> bool:
        """It ended by itself, with exit status 0."""
        return self.status == 0

    @property
    def why(self) -> str:
        """What went wrong."""
        if self.status is None:
            return f"out of time: killed after {self.seconds:.0f} s"
        if self.status < 0:
            return f"ended by {signal.Signals(-self.status).name}"
        return f"exit status {self.status}" + (f": {self.last_words}" if self.last_words else "")


def run(
    command: Sequence[str], limit_s: float, environment: Mapping[str, str] | None = None, log: Path | None = None
) -> Ended:
    """Run a command to its end, or for so many seconds. What it has started ends with it.

    Args:
        command: what to run.
        limit_s: how long it may take.
        environment: variables beside those of this process.
        log: what standard error is added to; none: this process's own.
    """
    started = time.monotonic()
    last_words: list[str] = []
    # A file, not a pipe: nobody has to read it while the command runs, and it is there when the
    # command is not.
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            env={**os.environ, **(environment or {})},
            process_group=0,
        )
        passing_on = threading.Thread(target=_pass_on, args=(process.stderr, last_words, log), daemon=True)
        passing_on.start()
        status: int | None = None
        try:
            status = process.wait(limit_s)
        except subprocess.TimeoutExpired:
            pass
        finally:
            _kill(process)
        passing_on.join(KILL_S)
        output.seek(0)
        text = output.read().decode(errors="replace")
    return Ended(status, text, last_words[-1] if last_words else "", time.monotonic() - started)


def _pass_on(stream: IO[str], last_words: list[str], log: Path | None) -> None:
    with log.open("a") if log is not None else nullcontext(sys.stderr) as out:
        for line in stream:
            out.write(line)
            out.flush()
            if line.strip():
                last_words[:] = [line.strip()]


def _kill(process: subprocess.Popen[str]) -> None:
    """The process and all that is still there of what it started: one of these may hold the device's memory."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    try:
        process.wait(KILL_S)
    except subprocess.TimeoutExpired:
        print(f"gpu-check: process {process.pid} does not die; the driver holds it", file=sys.stderr, flush=True)
