"""What a program or a library needs, read from its ELF header and its dynamic symbols."""

import re
import subprocess
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Needs:
    """What a file needs of a system.

    Attributes:
        machine: the machine's number.
        glibc: the newest version of glibc that a symbol asks for.
        libraries: shared libraries by name.
    """

    machine: int
    glibc: tuple[int, int]
    libraries: frozenset[str]


def needs(path: Path) -> Needs:
    """Read them.

    Raises:
        ValueError: it is no ELF file.
        subprocess.CalledProcessError: readelf does not understand it.
    """
    head = path.read_bytes()[:20]
    if head[:4] != b"\x7fELF":
        message = f"{path} is no ELF file"
        raise ValueError(message)
    command = ["readelf", "--wide", "--dynamic", "--version-info", str(path)]
    said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    versions = [(int(major), int(minor)) for major, minor in re.findall(r"GLIBC_(\d+)\.(\d+)", said)]
    return Needs(
        machine=int.from_bytes(head[18:20], "little"),
        glibc=max(versions, default=(0, 0)),
        libraries=frozenset(re.findall(r"\(NEEDED\).*\[(.+)\]", said)),
    )
