"""The command's program, which lies in the package: in this process's place, or beside it."""

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

PROGRAM = Path(__file__).parent / "bin" / "kvcellar"


def line(arguments: Sequence[str]) -> list[str]:
    """The command line with these arguments. Ends this process where the program is missing."""
    if not PROGRAM.is_file():
        sys.exit("kvcellar: this package was built without the command. Run scripts/setup, or pip install it again")
    return [str(PROGRAM), *arguments]


def become(arguments: Sequence[str]) -> NoReturn:
    """Run the command in this process's place."""
    os.execv(PROGRAM, line(arguments))


def run(arguments: Sequence[str]) -> int:
    """Run the command and wait for its end. Returns its exit code: 0 done, 1 refused, 2 wrong usage."""
    return subprocess.run(line(arguments), check=False).returncode


def output(arguments: Sequence[str]) -> str | None:
    """What the command prints; ``None`` where it failed, which it has told on standard error."""
    done = subprocess.run(line(arguments), stdout=subprocess.PIPE, text=True, check=False)
    return None if done.returncode else done.stdout
