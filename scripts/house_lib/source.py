"""Rust sources as text: comments and literals blanked, test modules cut out. No parser, and it need not be one."""

import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SRC = ROOT / "src"
_LITERAL = re.compile(
    r"""//[^\n]*|/\*.*?\*/|b?r(?P<hashes>#*)".*?"(?P=hashes)|[bc]?"(?:\\.|[^"\\])*"|b?'(?:\\(?:u\{\w+\}|.[0-9a-f]*)|[^'\\])'""",
    re.DOTALL,
)
_VISIBLE = r"(?:pub(?:\([^)]*\))?\s+)?"
_TEST_MODULE = re.compile(r"#\[cfg\((?:all\()?test\b[^\]]*\]\s*(?:#\[[^\]]*\]\s*)*" + _VISIBLE + r"mod\s+\w+\s*\{")


def _blank(match: re.Match[str]) -> str:
    return " " + "\n" * match[0].count("\n")


def closing(code: str, start: int) -> int:
    """Where the brace that opens at ``start`` closes."""
    depth = 0
    for at in range(start, len(code)):
        if code[at] == "{":
            depth += 1
        elif code[at] == "}":
            depth -= 1
            if depth == 0:
                return at
    return len(code) - 1


@dataclass(frozen=True)
class Source:
    """One file.

    Attributes:
        path: below `src`.
        text: as it is.
    """

    path: Path
    text: str

    @property
    def krate(self) -> str:
        """The folder of its crate."""
        return self.path.parts[0]

    @property
    def module(self) -> tuple[str, ...]:
        """Its path in the crate; the root is empty."""
        parts = (*self.path.parts[1:-1], self.path.stem)
        return parts[:-1] if parts[-1] in {"lib", "main", "mod"} else parts

    @cached_property
    def code(self) -> str:
        """Without comments, literals and test modules; lines stay where they are."""
        code = _LITERAL.sub(_blank, self.text)
        while found := _TEST_MODULE.search(code):
            end = closing(code, found.end() - 1)
            code = code[: found.start()] + "\n" * code[found.start() : end + 1].count("\n") + code[end + 1 :]
        return code

    @cached_property
    def functions(self) -> list[tuple[str, int]]:
        """Name and lines of every function with a body."""
        found = []
        for match in re.finditer(r"\bfn\s+(\w+)", self.code):
            opening, ending = self.code.find("{", match.end()), self.code.find(";", match.end())
            if opening >= 0 and not 0 <= ending < opening:
                end = closing(self.code, opening)
                found.append((match[1], self.code.count("\n", match.start(), end) + 1))
        return found

    @cached_property
    def types(self) -> list[str]:
        """Names of types declared at the top of the file."""
        pattern = rf"^{_VISIBLE}(?:struct|enum|trait|union|type)\s+(\w+)"
        return re.findall(pattern, self.code, re.MULTILINE)

    @cached_property
    def public(self) -> list[str]:
        """Names of functions, types and constants that others may use."""
        pattern = (
            r"(?<!\])\n\s*pub\s+(?:async\s+|const\s+|unsafe\s+)*(?:fn|struct|enum|trait|type|const|static)\s+(\w+)"
        )
        return [name for name in re.findall(pattern, self.code) if name not in {"fn", "unsafe"}]


def sources() -> list[Source]:
    """All of them, but for what only tests use."""
    paths = sorted(path for path in SRC.rglob("*.rs") if path.relative_to(SRC).parts[0] != "testkit")
    return [Source(path.relative_to(SRC), path.read_text()) for path in paths]
