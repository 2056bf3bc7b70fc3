"""Folders of a run alone."""

import tempfile
from pathlib import Path


def in_memory(purpose: str) -> tempfile.TemporaryDirectory[str]:
    """A folder in shared memory (ordinary temporary storage where there is none), removed with all it holds.

    `purpose`: a part of its name.
    """
    shared_memory = Path("/dev/shm")
    return tempfile.TemporaryDirectory(
        prefix=f"kvcellar-{purpose}-", dir=shared_memory if shared_memory.is_dir() else None
    )
