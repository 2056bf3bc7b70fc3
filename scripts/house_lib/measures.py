"""The measures and their bounds: what was reached once is not given up."""

import re
import statistics
from collections import Counter, defaultdict
from dataclasses import dataclass, field

from house_lib.circles import circles
from house_lib.source import ROOT, SRC, Source, sources

COMMENT_COLUMNS = 100


@dataclass(frozen=True)
class Measure:
    """One number.

    Attributes:
        name: what was measured.
        value: what it is.
        bound: what it may be at most; none: it is only told.
        details: what makes it so.
    """

    name: str
    value: float
    bound: float | None = None
    details: list[str] = field(default_factory=list)

    @property
    def over(self) -> bool:
        """It is more than it may be."""
        return self.bound is not None and self.value > self.bound


def _sizes(files: list[Source]) -> list[Measure]:
    lines = sorted(source.text.count("\n") for source in files)
    functions = sorted((length, f"{source.path}: {name}") for source in files for name, length in source.functions)
    lengths = [length for length, _ in functions]
    longest = [f"{length} {name}" for length, name in functions[-5:]]
    return [
        Measure("files", len(files)),
        Measure("lines of a file, median", statistics.median(lines), 150),
        Measure("lines of a file, longest", lines[-1], 600),
        Measure("lines of a function, median", statistics.median(lengths), 8),
        Measure("lines of a function, nine of ten", lengths[len(lengths) * 9 // 10], 24),
        Measure("lines of a function, longest", lengths[-1], 82, longest),
    ]


def _names(files: list[Source]) -> Measure:
    where: dict[str, set[str]] = defaultdict(set)
    for source in files:
        for name in source.types:
            where[name].add(str(source.path))
    again = {name: paths for name, paths in where.items() if len(paths) > 1}
    by_count = sorted(again.items(), key=lambda item: -len(item[1]))
    details = [f"{name}: {', '.join(sorted(paths))}" for name, paths in by_count]
    return Measure("type names declared in more than one file, percent", 100 * len(again) / len(where), 5, details)


def _unused(files: list[Source]) -> Measure:
    """Public items that nothing names: neither another line of the sources, nor tests, benches or fuzzers."""
    tops = (ROOT / "tests", ROOT / "benches", ROOT / "fuzz" / "fuzz_targets", SRC / "testkit")
    others = [path.read_text() for top in tops for path in top.rglob("*.rs")]
    used: Counter[str] = Counter()
    for text in (*(source.code for source in files), *others):
        used.update(re.findall(r"\w+", text))
    entry = {"main"}
    details = sorted(
        f"{source.path}: {name}"
        for source in files
        if source.krate != "python"
        for name in source.public
        if used[name] < 2 and name not in entry
    )
    return Measure("public items that nothing uses", len(details), 0, details)


def _silence(files: list[Source]) -> list[Measure]:
    loud = [
        str(source.path)
        for source in files
        if source.krate not in {"bench", "command"} and re.search(r"\beprintln?!", source.code)
    ]
    wide = [
        f"{source.path}:{number}"
        for source in files
        for number, line in enumerate(source.text.splitlines(), 1)
        if line.lstrip().startswith("//") and len(line) > COMMENT_COLUMNS
    ]
    return [
        Measure("libraries that write to standard error", len(loud), 0, loud),
        Measure(f"comment lines over {COMMENT_COLUMNS} columns", len(wide), 0, wide),
    ]


def measure() -> list[Measure]:
    """All of them."""
    files = sources()
    rings = circles(files)
    return [
        *_sizes(files),
        Measure("circles of imports within a crate", len(rings), 0, [", ".join(ring) for ring in rings]),
        _names(files),
        _unused(files),
        *_silence(files),
    ]
