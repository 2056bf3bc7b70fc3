"""Unpacks all archives beside it, in parallel (usage: python3 unpack.py INTO)."""

import sys
import tarfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path


def one(path: Path) -> None:
    """One archive."""
    with tarfile.open(path, "r:xz") as archive:
        archive.extractall(sys.argv[1], filter="data")


if __name__ == "__main__":
    started = time.monotonic()
    with ProcessPoolExecutor() as pool:
        list(pool.map(one, sorted(Path(__file__).parent.glob("*.tar.xz"))))
    print(f"bundle unpacked in {time.monotonic() - started:.1f} s", file=sys.stderr)
