"""What was found so far, on disk after every stage: whoever takes the file, at any moment, has valid JSON."""

import json
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gpu_check_lib.table import Row, State, show


@dataclass
class Report:
    """The one report of a run.

    Attributes:
        path: where it is written.
        whole: all of it; `complete` when the last stage has ended.
        rows: of the table, in the order in which they were found.
    """

    path: Path
    whole: dict[str, Any]
    rows: list[Row] = field(default_factory=list)

    @property
    def failed(self) -> bool:
        """Something did not end well. Missed goals are no failures."""
        return any(row.state is State.FAILED for row in self.rows)

    def begin(self, stage: str, what: str) -> None:
        """A stage begins."""
        print(f"\n--- {stage}: {what}", flush=True)
        self.whole["stages"][stage] = {"rows": [], "found": {}, "seconds": None}
        self._started = time.monotonic()

    def add(self, stage: str, rows: list[Row], **found: Any) -> None:
        """A stage has found something."""
        show(rows)
        self.rows += rows
        self.whole["stages"][stage]["rows"] += [row.as_json() for row in rows]
        self.whole["stages"][stage]["found"] |= found
        self.whole["stages"][stage]["seconds"] = round(time.monotonic() - self._started, 1)
        self.write()

    def found(self, stage: str) -> dict[str, Any]:
        """What an earlier stage has found; nothing where it did not run."""
        result: dict[str, Any] = self.whole["stages"].get(stage, {}).get("found", {})
        return result

    def write(self) -> None:
        """Replaces the file as a whole."""
        unfinished = self.path.with_suffix(".unfinished")
        unfinished.write_text(json.dumps(self.whole, indent=1) + "\n")
        unfinished.replace(self.path)
