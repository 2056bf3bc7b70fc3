"""Machine code of other GPUs in a compiled file, zeroed where it lies: offsets and headers stay, and it packs small.

The section .nv_fatbin holds containers, each with one kernel's code for several architectures and as PTX.
"""

import struct

MAGIC = 0xBA55ED50
PTX, ELF = 1, 2


class NoFatbinError(Exception):
    """The file has no code for GPUs."""


def _section(elf: bytes) -> tuple[int, int]:
    """Where .nv_fatbin lies in an ELF file: offset and size."""
    (headers,) = struct.unpack_from("<Q", elf, 0x28)
    entry, count, names = struct.unpack_from("<HHH", elf, 0x3A)
    sections = [struct.unpack_from("<IIQQQQ", elf, headers + number * entry) for number in range(count)]
    strings = sections[names][4]
    for name, _, _, _, offset, size in sections:
        at = strings + name
        if elf[at : elf.index(b"\0", at)] == b".nv_fatbin":
            return offset, size
    raise NoFatbinError("the file has no section .nv_fatbin")


def _entries(elf: bytes | bytearray, at: int, stop: int) -> list[tuple[int, int, int, int]]:
    """A container's entries: kind, architecture, and where the code lies."""
    found = []
    while at < stop:
        kind, _, header, size = struct.unpack_from("<HHIQ", elf, at)
        (architecture,) = struct.unpack_from("<I", elf, at + 28)
        found.append((kind, architecture, at + header, size))
        at += header + size
    return found


def keep_only(elf: bytes, architecture: int) -> tuple[bytes, int]:
    """The same file with the code of one architecture, and how many kernels have code for it.

    PTX stays where there is no code for it: the driver compiles that.
    """
    pruned = bytearray(elf)
    offset, size = _section(elf)
    at, end, native_count = offset, offset + size, 0
    while at < end - 16:
        magic, _, header, length = struct.unpack_from("<IHHQ", pruned, at)
        if magic != MAGIC:
            at += 8
            continue
        entries = _entries(pruned, at + header, at + header + length)
        native = any(kind == ELF and of == architecture for kind, of, _, _ in entries)
        native_count += native
        for kind, of, where, count in entries:
            if (kind == ELF and of != architecture) or (kind == PTX and native):
                pruned[where : where + count] = bytes(count)
        at += header + length
    return bytes(pruned), native_count
