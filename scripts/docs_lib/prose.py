"""What must be true of every page: links and anchors lead somewhere, named files and metrics exist, lines are short."""

import re
from collections.abc import Iterator
from pathlib import Path

from docs_lib import declared
from docs_lib.pages import DOCS, FENCE, ROOT, all_pages, name, prose

COLUMNS_MAX = 100
# A list of what was, with names that are no more and lines from before the bound.
HISTORY = ROOT / "CHANGELOG.md"
CODE = re.compile(r"`[^`]*`")
LINK = re.compile(r"!?\[(?:[^\[\]]|\[[^\]]*\])*\]\(\s*<?([^)\s>]+)>?(?:\s+\"[^\"]*\")?\s*\)")
REFERENCE = re.compile(r"^\s*\[[^\]]+\]:\s+<?(\S+?)>?\s*$")
ELSEWHERE = re.compile(r"^[a-z][a-z0-9+.-]*:")
HEADING = re.compile(r"^(#{1,6})\s+(.*?)\s*#*\s*$")
EXPLICIT = re.compile(r"<a\s+(?:id|name)=\"([^\"]+)\"")
# A file or folder of the repository, as pages name it in code.
PLACE = re.compile(r"`((?:src|python|scripts|tests|docs|reports|cuda|benches|fuzz)/[\w./-]*[\w/]|[\w-]+\.(?:md|toml))`")
METRIC = re.compile(r"\b(?:vllm:kvcellar|kvcellar_(?:index|route))_\w+")


def slug(heading: str) -> str:
    """The anchor that code hosts give a heading."""
    text = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", heading)
    text = re.sub(r"[`*]", "", text).strip().lower()
    return re.sub(r"[^\w\- ]", "", text).replace(" ", "-")


def anchors(path: Path) -> set[str]:
    """All anchors of a page."""
    found: set[str] = set()
    seen: dict[str, int] = {}
    for _, line in prose(path.read_text()):
        found.update(EXPLICIT.findall(line))
        heading = HEADING.match(line)
        if heading:
            base = slug(heading[2])
            count = seen.get(base, 0)
            seen[base] = count + 1
            found.add(base if count == 0 else f"{base}-{count}")
    return found


def links(text: str) -> Iterator[tuple[int, str]]:
    """Line and target of every link outside code."""
    for number, line in prose(text):
        bare = CODE.sub("", line)
        for target in LINK.findall(bare):
            yield number, target
        reference = REFERENCE.match(bare)
        if reference:
            yield number, reference[1]


def broken_links(path: Path) -> Iterator[str]:
    """Links of a page that lead nowhere. Those to other hosts are not followed."""
    for number, target in links(path.read_text()):
        if ELSEWHERE.match(target):
            continue
        where, _, anchor = target.partition("#")
        to = (path.parent / where).resolve() if where else path
        if where.startswith("/") or not to.is_relative_to(ROOT):
            yield f"{name(path)}:{number}: {target}: write a link relative to this page, within the repository"
        elif not to.exists():
            yield f"{name(path)}:{number}: {target}: there is no {name(to)}"
        elif anchor and to.suffix == ".md" and anchor not in anchors(to):
            yield f"{name(path)}:{number}: {target}: {name(to)} has no such heading"


def missing_places(path: Path) -> Iterator[str]:
    """Files that a page names in code and that are not there."""
    for number, line in prose(path.read_text()):
        for place in PLACE.findall(line):
            # Written by the scripts, and not committed.
            if place.startswith("reports/local"):
                continue
            beside = any((base / place).exists() for base in (ROOT, path.parent, DOCS))
            if not beside:
                yield f"{name(path)}:{number}: `{place}` is not there"


def unknown_metrics(path: Path) -> Iterator[str]:
    """Metrics that a page names and no source declares."""
    known = {one for metric in declared.everything() for one in (metric.name, *metric.samples)}
    for number, line in enumerate(path.read_text().splitlines(), 1):
        for found in METRIC.findall(line):
            if found not in known:
                yield f"{name(path)}:{number}: no source declares the metric {found}"


def long_lines(path: Path) -> Iterator[str]:
    """Lines of prose that are too long. Tables, headings' anchors and lines that are one link cannot be broken."""
    for number, line in prose(path.read_text()):
        if len(line) > COLUMNS_MAX and not line.startswith("|") and " " in line.strip():
            yield f"{name(path)}:{number}: {len(line)} columns; {COLUMNS_MAX} are allowed"


def unclosed_fence(path: Path) -> Iterator[str]:
    """A block of code that does not end hides all that follows from the other checks."""
    if sum(bool(FENCE.match(line)) for line in path.read_text().splitlines()) % 2:
        yield f"{name(path)}: a fenced block is not closed"


def problems() -> Iterator[str]:
    """Everything that is wrong with the pages."""
    for path in all_pages():
        yield from unclosed_fence(path)
        yield from broken_links(path)
        if path != HISTORY:
            yield from missing_places(path)
            yield from unknown_metrics(path)
            yield from long_lines(path)
