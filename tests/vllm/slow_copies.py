"""The brake on copies of blocks (slow_copies.c): made, loaded into an engine, used inside it."""

import ctypes
import os
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

SOURCE = Path(__file__).with_name("slow_copies.c")
VARIABLE = "KVCELLAR_TEST_SLOW_COPIES"
HELD_S_MAX = 20.0
STUTTER_S = 0.01


def make(folder: Path) -> dict[str, str]:
    """Compiles it, and returns the environment of a process that is to have it."""
    library = folder / "slow_copies.so"
    flags = ["-shared", "-fPIC", "-O2", "-Wall", "-Werror"]
    subprocess.run(["cc", *flags, str(SOURCE), "-o", str(library)], check=True)
    return {VARIABLE: str(library)}


class Brake:
    """The brake of this process."""

    def __init__(self) -> None:
        """Loads the library."""
        self._library = ctypes.CDLL(os.environ[VARIABLE])
        self._library.hold.argtypes = self._library.let_go_in.argtypes = [ctypes.c_long]

    def hold(self, seconds: float = HELD_S_MAX) -> None:
        """The threads that copy blocks stand still until `let_go`, or for `seconds`."""
        threads = self._library.hold(round(seconds * 1000))
        assert threads > 0, "no thread that copies blocks was found"

    def let_go(self, seconds: float = 0.0) -> None:
        """Copies go on after `seconds`, even if nobody calls anything until then."""
        self._library.let_go_in(round(seconds * 1000))

    @contextmanager
    def stutter(self) -> Iterator[None]:
        """Meanwhile copies stand still most of the time."""
        over = threading.Event()

        def run() -> None:
            while not over.is_set():
                self.hold(STUTTER_S)
                over.wait(STUTTER_S)

        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()
            self.let_go()
