"""Where things lie, and temporary directories that leave nothing behind."""

import contextlib
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CACHE = ROOT / ".cache"
SMOLLM2 = CACHE / "model" / "smollm2-135m"


def real_model() -> Path:
    """The small real model.

    Raises:
        FileNotFoundError: scripts/setup has not made it.

    """
    if not (SMOLLM2 / "config.json").is_file():
        raise FileNotFoundError(f"{SMOLLM2.relative_to(ROOT)} is missing: run scripts/setup")
    return SMOLLM2


@contextlib.contextmanager
def temporary_pool_dir() -> Iterator[Path]:
    """A directory on shared memory for one engine's pools, removed with everything in it at the end."""
    path = Path(tempfile.mkdtemp(prefix="kvcellar-test-", dir="/dev/shm"))
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


@contextlib.contextmanager
def temporary_disk_dir() -> Iterator[Path]:
    """A directory on a disk, not in shared memory."""
    CACHE.mkdir(exist_ok=True)
    path = Path(tempfile.mkdtemp(prefix="nvme-test-", dir=CACHE))
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


def pool_files(pool_dir: Path) -> list[Path]:
    """All pool files below a `pool_dir`."""
    return sorted(pool_dir.glob("kvcellar-*/*.pool"))
