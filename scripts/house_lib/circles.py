"""Files of one crate that name each other in a circle."""

import re
from collections import defaultdict
from collections.abc import Iterable

from house_lib.source import Source

Module = tuple[str, ...]


def _paths(source: Source) -> Iterable[Module]:
    """Paths that a file names, from the root of its crate."""
    for match in re.finditer(r"\b(crate|super|self)\b((?:::\w+)*)(?:::\{)?", source.code):
        head, tail = match[1], [part for part in match[2].split("::") if part]
        base = list(source.module)
        if head == "crate":
            base = []
        elif head == "super":
            base = base[:-1]
        while tail and tail[0] == "super":
            base, tail = base[:-1], tail[1:]
        start = (*base, *tail)
        yield start
        if match[0].endswith("{"):
            for name in _heads(source.code, match.end()):
                yield (*start, *name)


def _heads(code: str, start: int) -> Iterable[Module]:
    """Paths of a brace group, one level deep."""
    depth, item = 1, ""
    for character in code[start:]:
        if character == "{":
            depth += 1
        elif character == "}":
            depth -= 1
        if depth == 0 or (depth == 1 and character == ","):
            yield tuple(part for part in re.split(r"::|\s+as\s+\w+|\s", item.split("{", maxsplit=1)[0]) if part)
            item = ""
            if depth == 0:
                return
        else:
            item += character


def graph(files: list[Source]) -> dict[Module, set[Module]]:
    """Which module names which others.

    A folder's own file stands for the folder. Parents do not count as users of their children, nor children of their
    parents' items: those are one unit told in several files.
    """
    modules = {source.module for source in files}
    found: dict[Module, set[Module]] = defaultdict(set)
    for source in files:
        for path in _paths(source):
            target = next((path[:end] for end in range(len(path), -1, -1) if path[:end] in modules), ())
            if target and target != source.module and not _related(source.module, target):
                found[source.module].add(target)
    return found


def _related(one: Module, other: Module) -> bool:
    shorter = min(len(one), len(other))
    return one[:shorter] == other[:shorter]


def circles(files: list[Source]) -> list[list[str]]:
    """Modules that reach each other, by crate."""
    found = []
    for krate in sorted({source.krate for source in files}):
        edges = graph([source for source in files if source.krate == krate])
        found += [[f"{krate}::{'::'.join(module)}" for module in sorted(component)] for component in _components(edges)]
    return found


def _components(edges: dict[Module, set[Module]]) -> list[set[Module]]:
    """Sets of more than one module that reach each other."""
    reach: dict[Module, set[Module]] = {}
    for start in list(edges):
        seen: set[Module] = set()
        todo = list(edges[start])
        while todo:
            module = todo.pop()
            if module not in seen:
                seen.add(module)
                todo += edges.get(module, set())
        reach[start] = seen
    components: list[set[Module]] = []
    for module, reached in reach.items():
        if module in reached and not any(module in known for known in components):
            components.append({other for other in reached if module in reach.get(other, set())})
    return [component for component in components if len(component) > 1]
