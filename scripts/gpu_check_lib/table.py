"""The table that people see."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum


class State(StrEnum):
    """What a row says.

    Attributes:
        OK: a test passed, a goal was met, or a fact was found.
        MISSED: a goal was missed. It is reported and fails nothing.
        FAILED: a test failed, or something did not end well.
        SKIPPED: not run, and the row says why.
        STUB: run without a GPU, to see that it runs: it measures nothing.
    """

    OK = "ok"
    MISSED = "MISSED"
    FAILED = "FAILED"
    SKIPPED = "skipped"
    STUB = "stub"


@dataclass(frozen=True)
class Row:
    """One thing that was checked.

    Attributes:
        name: what.
        found: the value, or what happened.
        state: what that means.
    """

    name: str
    found: str
    state: State

    @classmethod
    def of(cls, told: dict[str, str]) -> "Row":
        """A row that another process has told."""
        return cls(told["name"], told["found"], State(told["state"]))

    def as_json(self) -> dict[str, str]:
        """The row for the report."""
        return asdict(self)


def passed(name: str, found: str, ok: bool) -> Row:
    """The row of a test."""
    return Row(name, found, State.OK if ok else State.FAILED)


def goal(name: str, found: str, met: bool) -> Row:
    """The row of a goal."""
    return Row(name, found, State.OK if met else State.MISSED)


def show(rows: Sequence[Row]) -> None:
    """Print the rows. What prints them may be killed next, so they are out when this returns."""
    width = max((len(row.name) for row in rows), default=0)
    for row in rows:
        print(f"{row.state:<8}{row.name:<{width}}  {row.found}", flush=True)
