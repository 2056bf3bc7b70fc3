"""Wheels in, archives out. Nothing here runs code of a wheel."""

import io
import lzma
import tarfile
import zipfile
from collections.abc import Mapping
from pathlib import Path

Files = Mapping[str, bytes]
_PARTS_OF_SITE = {"purelib", "platlib"}


def contents(wheel: Path) -> dict[str, bytes]:
    """Everything that a wheel would install among packages."""
    found = {}
    with zipfile.ZipFile(wheel) as archive:
        for info in archive.infolist():
            parts = info.filename.split("/", 2)
            of_data = parts[0].endswith(".data")
            if info.is_dir() or (of_data and parts[1] not in _PARTS_OF_SITE):
                continue
            found[parts[2] if of_data else info.filename] = archive.read(info)
    return found


def pack(path: Path, files: Files) -> Path:
    """Write files as one tar.xz: equal files, equal bytes. It is there as a whole or not at all."""
    unfinished = path.with_suffix(".unfinished")
    with (
        lzma.open(unfinished, "wb", preset=6) as compressed,
        tarfile.open(fileobj=compressed, mode="w|") as archive,
    ):
        for name in sorted(files):
            member = tarfile.TarInfo(name)
            member.size, member.mode = len(files[name]), 0o755
            archive.addfile(member, io.BytesIO(files[name]))
    return unfinished.replace(path)
