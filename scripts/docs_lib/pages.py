"""Markdown pages: which there are, their generated parts, and their text without code."""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
FENCE = re.compile(r"^\s*(```|~~~)")


def all_pages() -> list[Path]:
    """Every Markdown file of the repository's top level and of docs/, in order."""
    return sorted([*ROOT.glob("*.md"), *DOCS.rglob("*.md")])


def name(path: Path) -> str:
    """The path of a file, from the repository's root."""
    return str(path.relative_to(ROOT))


def prose(text: str) -> Iterator[tuple[int, str]]:
    """Number and text of each line that is not in a fenced block."""
    fenced = False
    for number, line in enumerate(text.splitlines(), 1):
        if FENCE.match(line):
            fenced = not fenced
        elif not fenced:
            yield number, line


def with_part(text: str, part: str, content: str) -> str:
    """A page's text with the generated part of this name replaced.

    Raises:
        ValueError: the page has no such part.
    """
    start, end = f"<!-- {part}: scripts/docs -->", f"<!-- /{part} -->"
    if text.count(start) != 1 or text.count(end) != 1:
        message = f"the lines `{start}` and `{end}` must each stand in it once"
        raise ValueError(message)
    before, rest = text.split(start)
    _, after = rest.split(end)
    return f"{before}{start}\n\n{content}\n\n{end}{after}"


def table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    """A Markdown table."""
    lines = [f"| {' | '.join(head)} |", f"|{' --- |' * len(head)}"]
    lines += [f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |" for row in rows]
    return "\n".join(lines)
