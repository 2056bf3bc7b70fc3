"""The table that people see."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass


@dataclass(frozen=True)
class Row:
    """One thing that was checked.

    Attributes:
        name: what.
        found: the value, or what happened.
        ok: a test passed, a goal was met, or there was none.
    """

    name: str
    found: str
    ok: bool

    def as_json(self) -> dict[str, object]:
        """The row for the report."""
        return asdict(self)


def show(rows: Sequence[Row]) -> None:
    """Print the rows. What prints them may be killed next, so they are out when this returns."""
    width = max((len(row.name) for row in rows), default=0)
    for row in rows:
        print(f"{'ok     ' if row.ok else 'NOT OK '} {row.name:<{width}}  {row.found}", flush=True)
