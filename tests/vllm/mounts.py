"""Small file systems of a test's own: one in memory, one on a disk. Root makes them; others get what is there."""

import contextlib
import os
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.vllm.places import temporary_disk_dir, temporary_pool_dir


def taken(directory: Path) -> int:
    """Bytes that a directory takes.

    Of a file system of its own everything counts, also files that have no name any more; else what `du` counts.
    """
    if os.path.ismount(directory):
        found = os.statvfs(directory)
        return (found.f_blocks - found.f_bfree) * found.f_frsize
    total = 0
    for path in directory.rglob("*"):
        with contextlib.suppress(FileNotFoundError):
            total += path.stat().st_blocks * 512
    return total


def fill(directory: Path) -> None:
    """Takes the file system of a directory to its last block."""
    for size in (1 << 20, 1 << 12):
        with (directory / f"others-{size}").open("wb", buffering=0) as file, contextlib.suppress(OSError):
            while file.write(bytes(size)) == size:
                pass
            os.fsync(file.fileno())
    os.sync()


@contextlib.contextmanager
def _mounted(*command: str) -> Iterator[Path]:
    """Mounts something on a directory of its own, and takes it down again; files that are still open stay theirs."""
    with tempfile.TemporaryDirectory(prefix="kvcellar-mount-") as path:
        subprocess.run([*command, path], check=True, capture_output=True)
        try:
            yield Path(path)
        finally:
            subprocess.run(["umount", "--lazy", path], check=True)


@contextlib.contextmanager
def memory_dir(size: int) -> Iterator[Path]:
    """A tmpfs of so many bytes; shared memory where nobody may mount."""
    if os.geteuid() != 0:
        with temporary_pool_dir() as path:
            yield path
        return
    with _mounted("mount", "-t", "tmpfs", "-o", f"size={size},mode=755", "kvcellar-test") as path:
        yield path


@contextlib.contextmanager
def small_disk(size: int) -> Iterator[Path]:
    """An ext4 of so many bytes, in an image on this machine's disk. Skips the test where nobody may mount."""
    if os.geteuid() != 0:
        pytest.skip("an image can be mounted by root only")
    with temporary_disk_dir() as folder:
        image = folder / "image"
        with image.open("wb") as file:
            file.truncate(size)
        subprocess.run(["mkfs.ext4", "-q", "-F", "-m", "0", str(image)], check=True, capture_output=True)
        try:
            mounting = contextlib.ExitStack()
            path = mounting.enter_context(_mounted("mount", "-o", "loop", str(image)))
        except subprocess.CalledProcessError as refused:
            pytest.skip(f"this machine mounts no images: {refused.stderr.decode().strip()}")
        with mounting:
            yield path
