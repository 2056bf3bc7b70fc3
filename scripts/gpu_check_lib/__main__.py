"""Runs the hardware tests, the benchmark of the bus and the measurement of overlap: one table, one JSON file.

Each part runs in a process of its own and for a limited time: one that crashes, hangs or ruins the GPU's context costs
nothing of the others. What a part found is printed and written when it ends.
"""

import argparse
import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gpu_check_lib.child import Ended, run
from gpu_check_lib.table import Row, show

TEST_LIMIT_S = 120.0
BENCH_LIMIT_S = 180.0
OVERLAP_LIMIT_S = 180.0


@dataclass
class Report:
    """What was found so far.

    Attributes:
        path: where it is written after every part.
        whole: the report; `complete` when the last part has ended.
        rows: of the table.
        failed: a test failed, or a part ended without all it should have found. Missed goals are no failures.
    """

    path: Path
    whole: dict[str, Any]
    rows: list[Row] = field(default_factory=list)
    failed: bool = False

    def add(self, part: str, rows: list[Row], found: Any) -> None:
        """A part has ended."""
        show(rows)
        self.rows += rows
        self.whole[part] = found
        self.write()

    def write(self) -> None:
        """Replaces the file as a whole: whoever takes it, at any moment, has valid JSON."""
        unfinished = self.path.with_suffix(".unfinished")
        unfinished.write_text(json.dumps(self.whole, indent=1) + "\n")
        unfinished.replace(self.path)


def part(limit_s: float, *arguments: str) -> tuple[Ended, list[Row], list[dict[str, Any]]]:
    """Run a part: how it ended, its rows, and what else it told, also if it did not get to its end."""
    ended = run([sys.executable, "-m", "gpu_check_lib.part", "--limit-s", str(limit_s), *arguments], limit_s)
    told: list[dict[str, Any]] = []
    for line in ended.output.splitlines():
        try:
            told.append(json.loads(line))
        except json.JSONDecodeError:
            # Of a process that was killed in the middle of it, or of somebody else.
            continue
    rows = [Row(**row) for one in told for row in one.pop("rows")]
    return ended, rows, told


def tests(report: Report, binaries: list[str]) -> None:
    """The round trips over torch tensors, one process each, and built test binaries."""
    found: list[dict[str, object]] = []
    listed, _, told = part(TEST_LIMIT_S, "list")
    for listing in told:
        report.whole |= listing
    names = report.whole.pop("names", [])
    if not listed.ok or not names:
        rows = [Row("list of round trips", listed.why, ok=False)]
        found += [row.as_json() for row in rows]
        report.failed = True
        report.add("tests", rows, found)
    for name in names:
        ended, rows, _ = part(TEST_LIMIT_S, "test", name)
        if not ended.ok:
            # It may have passed and crashed at its end.
            rows = [Row(name, ended.why, ok=False)]
        found += [row.as_json() for row in rows]
        report.failed |= not all(row.ok for row in rows)
        report.add("tests", rows, found)
    for path in binaries:
        row = binary(path)
        found.append(row.as_json())
        report.failed |= not row.ok
        report.add("tests", [row], found)


def binary(path: str) -> Row:
    """A built test binary."""
    try:
        ended = run([path], TEST_LIMIT_S)
    except OSError as error:
        return Row(Path(path).name, str(error), ok=False)
    told = next((line for line in ended.output.splitlines() if line.startswith("test result")), ended.why)
    return Row(Path(path).name, told if ended.ok else f"{told} ({ended.why})", ended.ok)


def bench(report: Report) -> None:
    """`kvcellar bench dma`: its report, and a row for each of its goals."""
    name = "kvcellar bench dma"
    ended = run([sys.executable, "-m", "kvcellar", "bench", "dma", "--json"], BENCH_LIMIT_S)
    try:
        found = json.loads(ended.output) if ended.ok else None
        problem = ended.why
    except json.JSONDecodeError as error:
        found, problem = None, f"its report is no JSON: {error}"
    if found is None:
        report.failed = True
        report.add("bench", [Row(name, problem, ok=False)], None)
        return
    rows = [Row(goal["name"], f"{goal['value']:.3f} ({goal['goal']})", goal["met"]) for goal in found["goals"]]
    report.add("bench", rows, found)


def overlap(report: Report) -> None:
    """What copies cost a model beside them."""
    ended, rows, told = part(OVERLAP_LIMIT_S, "overlap")
    if not ended.ok:
        report.failed = True
        rows.append(Row("overlap of copies and compute", ended.why, ok=False))
    report.add("overlap", rows, [one["cost"] for one in told])


def main() -> int:
    """Run everything. Goals that are missed are shown, and only failures make the exit code 1."""
    parser = argparse.ArgumentParser(prog="gpu-check")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("binaries", nargs="*")
    options = parser.parse_args()
    report = Report(options.out / "gpu-check.json", {"complete": False})
    tests(report, options.binaries)
    bench(report)
    overlap(report)
    report.whole["complete"] = True
    report.write()
    sys.stderr.flush()
    print(flush=True)
    show(report.rows)
    return 1 if report.failed else 0


if __name__ == "__main__":
    sys.exit(main())
