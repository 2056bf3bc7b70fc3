"""What a file holds, by a bounded number of small reads: size, the table of its tensors, and sampled pages.

Promises: equal files have equal digests, wherever they lie and whenever they were written; a file of up to
`WHOLE_BYTES_MAX` is read as a whole; of a larger one each tensor is looked at (up to a bound), and pages spread evenly.
Does not promise to see a change that leaves every sampled page alone: `docs/tiers.md` says so, and what to do then.
"""

import hashlib
import json
import os
import stat
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

PAGE = 4096
WHOLE_BYTES_MAX = 16 << 20
# Tensors of a file that are looked at, at two places each.
TENSORS_MAX = 512
# Pages spread evenly over any file that is not read as a whole.
SPREAD_PAGES = 256
# A longer table of tensors is taken for no table.
TABLE_BYTES_MAX = 64 << 20
READERS = 8
DIGEST_BYTES = 16
# Ticks of the process table and of file systems' clocks, with room.
_CLOCK_GRAIN_S = 0.1


class ChangedError(Exception):
    """A file was written while it was looked at."""


@dataclass(frozen=True)
class Stamp:
    """What a file's directory entry says of it: as long as this stays, so does what was read.

    Attributes:
        device: number of the file system.
        inode: number in it.
        size: in bytes.
        modified_ns: time of the last write.
        changed_ns: time of the last write or change of the entry; cannot be set by hand.
    """

    device: int
    inode: int
    size: int
    modified_ns: int
    changed_ns: int

    @classmethod
    def of(cls, found: os.stat_result) -> "Stamp":
        """The stamp in what `stat` returned."""
        return cls(found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)


def digest_files(files: Iterable[tuple[str, Path]]) -> bytes:
    """Digest of several files with their names.

    Raises:
        OSError: a file cannot be read.
        ChangedError: a file was written meanwhile.
    """
    named = sorted(files)
    with ThreadPoolExecutor(READERS) as readers:
        digests = list(readers.map(digest_file, (path for _, path in named)))
    whole = hashlib.blake2b(digest_size=DIGEST_BYTES)
    for (name, _), digest in zip(named, digests, strict=True):
        whole.update(json.dumps([name, digest.hex()]).encode())
    return whole.digest()


def digest_file(path: Path) -> bytes:
    """Digest of one regular file: its size and its bytes, or its size and a sample of them.

    Raises:
        OSError: the file cannot be read, or is no regular file.
        ChangedError: the file was written meanwhile.
    """
    with path.open("rb", buffering=0) as file:
        before = os.fstat(file.fileno())
        if not stat.S_ISREG(before.st_mode):
            raise OSError(f"{path} is no regular file")
        digest = hashlib.blake2b(before.st_size.to_bytes(8, "little"), digest_size=DIGEST_BYTES)
        for start, length in _pieces(file.fileno(), before.st_size):
            digest.update(start.to_bytes(8, "little"))
            digest.update(_read(file.fileno(), start, length, path))
        if Stamp.of(os.fstat(file.fileno())) != Stamp.of(before):
            raise ChangedError(f"{path} was written while it was read")
        return digest.digest()


def _read(descriptor: int, start: int, length: int, path: Path) -> bytes:
    got = os.pread(descriptor, length, start)
    while len(got) < length:
        more = os.pread(descriptor, length - len(got), start + len(got))
        if not more:
            raise ChangedError(f"{path} became shorter while it was read")
        got += more
    return got


def _pieces(descriptor: int, size: int) -> Iterator[tuple[int, int]]:
    """Start and length of what is read, in ascending order."""
    if size <= WHOLE_BYTES_MAX:
        step = 1 << 20
        yield from ((start, min(step, size - start)) for start in range(0, size, step))
        return
    table = _table(descriptor, size)
    first = 8 + table if table else 0
    if first:
        yield (0, first)
    pages = {page - page % PAGE for page in _spread(first, size)}
    if first:
        pages |= {page - page % PAGE for page in _in_tensors(descriptor, first, size)}
    yield from ((page, min(PAGE, size - page)) for page in sorted(pages))


def _spread(first: int, size: int) -> Iterator[int]:
    """The first and the last byte, and bytes at even distances between them."""
    yield from (first + (size - 1 - first) * index // (SPREAD_PAGES - 1) for index in range(SPREAD_PAGES))


def _table(descriptor: int, size: int) -> int:
    """Bytes of a safetensors file's table, or 0 for any other file."""
    length = int.from_bytes(os.pread(descriptor, 8, 0), "little")
    looks_right = 0 < length <= min(TABLE_BYTES_MAX, size - 8) and os.pread(descriptor, 1, 8) == b"{"
    return length if looks_right else 0


def _in_tensors(descriptor: int, first: int, size: int) -> Iterator[int]:
    """A byte in the middle of each tensor and its last one; of a file with very many, of evenly chosen ones."""
    try:
        table = json.loads(os.pread(descriptor, first - 8, 8))
        spans = sorted(tuple(entry["data_offsets"]) for name, entry in table.items() if name != "__metadata__")
    except (ValueError, KeyError, TypeError, AttributeError):
        return
    chosen = spans[:: -(-len(spans) // TENSORS_MAX) or 1]
    for begin, end in chosen:
        if 0 <= begin < end <= size - first:
            yield first + (begin + end) // 2
            yield first + end - 1


def process_start_ns() -> int:
    """When this process began, on the clock of file systems; a little early rather than late.

    Raises:
        OSError: the system does not say.
    """
    # Fields after the command's closing bracket; the start is field 22 of the line, in ticks since
    # boot.
    ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
    age_s = time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    return time.time_ns() - int((age_s + _CLOCK_GRAIN_S) * 1e9)
