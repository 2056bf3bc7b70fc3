"""Byte layouts of the structs that lie in files, shared memory and messages, from their declarations."""

import re

from docs_lib.pages import ROOT

SRC = ROOT / "src"
SIZES = {"u8": 1, "u16": 2, "u32": 4, "u64": 8, "SaltTag": 8, "AtomicU32": 4, "FutexWord": 4, "AtomicU64": 8}


def _size(kind: str) -> tuple[int, int]:
    """Size and alignment of a field's type, in bytes.

    Raises:
        KeyError: a type that this script does not know.
    """
    array = re.fullmatch(r"\[(\w+); (\d+)\]", kind)
    if array:
        one = SIZES[array[1]]
        return one * int(array[2]), one
    return SIZES[kind], SIZES[kind]


def fields(file: str, struct: str) -> list[tuple[int, int, str]]:
    """Offset, size and name of each field of a `repr(C)` struct."""
    source = (SRC / file).read_text()
    head = rf"#\[repr\(C[^\]]*\)\]\s*(?:pub(?:\([^)]*\))? )?struct {struct} "
    found = re.search(head + r"\{(.*?)\n\}", source, re.DOTALL)
    if found is None:
        message = f"src/{file} has no `repr(C)` struct {struct} any more"
        raise ValueError(message)
    body = re.sub(r"//.*", "", found[1])
    offset = 0
    rows = []
    for name, kind in re.findall(r"(?:pub(?:\([^)]*\))? )?(\w+): ([^,]+),", body):
        size, align = _size(kind.strip())
        offset = -(-offset // align) * align
        rows.append((offset, size, name))
        offset += size
    return rows


def constant(file: str, name: str) -> str:
    """The value of a constant, as the source writes it."""
    found = re.search(rf"const {name}: [^=]+ = (.+);", (SRC / file).read_text())
    if found is None:
        message = f"src/{file} has no constant {name} any more"
        raise ValueError(message)
    return found[1].strip('*b"')
