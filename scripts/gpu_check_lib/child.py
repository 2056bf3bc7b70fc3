"""A command with a limit on its time: what hangs or crashes is reported, and the check goes on."""

import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
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


def run(command: Sequence[str], limit_s: float) -> Ended:
    """Run a command to its end, or for so many seconds."""
    started = time.monotonic()
    last_words: list[str] = []
    # A file, not a pipe: nobody has to read it while the command runs, and it is there when the command is not.
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.PIPE, text=True, errors="replace"
        )
        passing_on = threading.Thread(target=_pass_on, args=(process.stderr, last_words), daemon=True)
        passing_on.start()
        status: int | None = None
        try:
            status = process.wait(limit_s)
        except subprocess.TimeoutExpired:
            _kill(process)
        passing_on.join(KILL_S)
        output.seek(0)
        text = output.read().decode(errors="replace")
    return Ended(status, text, last_words[-1] if last_words else "", time.monotonic() - started)


def _pass_on(stream: IO[str], last_words: list[str]) -> None:
    for line in stream:
        sys.stderr.write(line)
        sys.stderr.flush()
        if line.strip():
            last_words[:] = [line.strip()]


def _kill(process: subprocess.Popen[str]) -> None:
    process.kill()
    try:
        process.wait(KILL_S)
    except subprocess.TimeoutExpired:
        print(f"gpu-check: process {process.pid} does not die; the driver holds it", file=sys.stderr, flush=True)
