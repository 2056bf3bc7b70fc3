"""Runs the hardware tests, the benchmark of the bus and the measurement of overlap: one table, one JSON file."""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
import unittest
from pathlib import Path
from typing import Any

import torch
from kvcellar import nvrtc

from gpu_check_lib.table import Row, show

SLOWDOWN_MAX = 0.02


def round_trips() -> list[Row]:
    """The tests over torch tensors, one row for each."""
    import test_round_trips

    suite = unittest.defaultTestLoader.loadTestsFromModule(test_round_trips)
    rows = []
    for test in (test for group in suite for test in group):
        started = time.monotonic()
        result = unittest.TextTestRunner(verbosity=0).run(unittest.TestSuite([test]))
        told = f"{time.monotonic() - started:.1f} s"
        if result.skipped:
            told = f"skipped: {result.skipped[0][1]}"
        rows.append(Row(test.id(), told, result.wasSuccessful()))
    return rows


def bench() -> tuple[dict[str, Any], list[Row]]:
    """`kvcellar bench dma`: its report, and a row for each of its goals."""
    command = [sys.executable, "-m", "kvcellar", "bench", "dma", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        return {}, [Row("kvcellar bench dma", done.stderr.strip(), ok=False)]
    report: dict[str, Any] = json.loads(done.stdout)
    rows = [Row(goal["name"], f"{goal['value']:.3f} ({goal['goal']})", goal["met"]) for goal in report["goals"]]
    return report, rows


def overlap() -> tuple[dict[str, float], list[Row]]:
    """What copies cost a model beside them."""
    import overlap as measurement

    pool_dir = Path(tempfile.mkdtemp(dir="/dev/shm"))
    try:
        found = measurement.measure(pool_dir, nvrtc.libraries())
    finally:
        shutil.rmtree(pool_dir)
    slowdown = found["matmul_slowdown"]
    rows = [
        Row(
            "matmul loop beside offloads, slowdown",
            f"{slowdown:.4f} (at most {SLOWDOWN_MAX})",
            slowdown <= SLOWDOWN_MAX,
        )
    ]
    rows += [Row(name, f"{value:.4f}", ok=True) for name, value in found.items() if name != "matmul_slowdown"]
    return found, rows


def binary(path: str) -> Row:
    """A built test binary."""
    done = subprocess.run([path], capture_output=True, text=True, check=False)
    told = next(
        (line for line in done.stdout.splitlines() if line.startswith("test result")), done.stderr[-200:].strip()
    )
    return Row(Path(path).name, told, done.returncode == 0)


def main() -> int:
    """Run everything. Goals that are missed are shown, and only failures of tests make the exit code 1."""
    parser = argparse.ArgumentParser(prog="gpu-check")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("binaries", nargs="*")
    options = parser.parse_args()
    tests = [*round_trips(), *(binary(path) for path in options.binaries)]
    report, goals = bench()
    slowdown, costs = overlap()
    whole = {
        "device": torch.cuda.get_device_name(0),
        "torch": torch.__version__,
        "tests": [row.as_json() for row in tests],
        "bench": report,
        "overlap": slowdown,
    }
    (options.out / "gpu-check.json").write_text(json.dumps(whole, indent=1) + "\n")
    show([*tests, *goals, *costs])
    return 0 if all(row.ok for row in tests) and report else 1


if __name__ == "__main__":
    sys.exit(main())
