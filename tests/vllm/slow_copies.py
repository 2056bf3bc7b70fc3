"""The brake on copies of blocks (slow_copies.c): made, preloaded into an engine's process, used inside it."""

import ctypes
import os
import subprocess
from pathlib import Path

SOURCE = Path(__file__).with_name("slow_copies.c")
VARIABLE = "KVCELLAR_TEST_SLOW_COPIES"


def make(folder: Path) -> dict[str, str]:
    """Compiles it, and returns the environment of a process that is to have it."""
    library = folder / "slow_copies.so"
    # Without builtins: the compiler would make a call of memcpy from the memmove inside memcpy.
    flags = ["-shared", "-fPIC", "-O2", "-Wall", "-Werror", "-fno-builtin", "-pthread"]
    subprocess.run(["cc", *flags, str(SOURCE), "-o", str(library)], check=True)
    preloaded = " ".join(filter(None, [str(library), os.environ.get("LD_PRELOAD")]))
    return {"LD_PRELOAD": preloaded, VARIABLE: str(library)}


class Brake:
    """The brake of this process."""

    def __init__(self) -> None:
        """Finds the library that was preloaded."""
        self._library = ctypes.CDLL(os.environ[VARIABLE])
        self._library.braked.restype = ctypes.c_long

    def hold(self) -> None:
        """No piece of a block is copied until `let_go`."""
        self._library.hold()

    def let_go(self) -> None:
        """Copies go on."""
        self._library.let_go()

    def pace(self, piece_us: int) -> None:
        """Every piece of a block takes so long; 0: as fast as it can."""
        self._library.pace(piece_us)

    def braked(self) -> int:
        """Pieces that were slowed down so far."""
        return int(self._library.braked())
