"""One part of the check, in a process of its own. Prints a line of JSON for each thing it finds, as it finds it.

`list` names the device and the round trips, `test NAME` runs one, `overlap` measures what copies cost a model beside
them.
"""

import argparse
import contextlib
import faulthandler
import json
import shutil
import sys
import tempfile
import time
import unittest
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from gpu_check_lib.table import Row, State, goal, show

if TYPE_CHECKING:
    import overlap

SLOWDOWN_MAX = 0.02
OFFLOADING_SHARE_MIN = 0.9
# A part that hangs says where it stands before it is killed.
STACKS_BEFORE_END_S = 10.0


def tell(out: TextIO, rows: list[Row], **found: Any) -> None:
    """One line for the process that started this one."""
    print(json.dumps({"rows": [row.as_json() for row in rows], **found}), file=out, flush=True)


def names(suite: unittest.TestSuite) -> Iterator[str]:
    """The tests in it."""
    for one in suite:
        if isinstance(one, unittest.TestSuite):
            yield from names(one)
        else:
            yield one.id()


def listing() -> dict[str, Any]:
    """What there is to run, and on what."""
    import test_round_trips
    import torch

    return {
        "device": torch.cuda.get_device_name(0) if torch.cuda.is_available() else "none",
        "torch": str(torch.__version__),
        "cuda": torch.version.cuda,
        "names": list(names(unittest.defaultTestLoader.loadTestsFromModule(test_round_trips))),
    }


def test(name: str) -> Row:
    """One round trip. What failed is told on standard error, too, in full."""
    from compute import DEVICE

    started = time.monotonic()
    result = unittest.TextTestRunner(verbosity=0).run(unittest.defaultTestLoader.loadTestsFromName(name))
    told = f"{time.monotonic() - started:.1f} s"
    if result.skipped:
        told = f"skipped: {result.skipped[0][1]}"
    failed = [*result.errors, *result.failures]
    if failed:
        _, trace = failed[0]
        told += f", {len(failed)} failed, first: {trace.strip().splitlines()[-1]}"
    ran = result.testsRun + len(result.skipped) > 0
    if not ran or not result.wasSuccessful():
        return Row(name, told, State.FAILED)
    if result.skipped:
        return Row(name, told, State.SKIPPED)
    return Row(name, told, State.OK) if DEVICE.type == "cuda" else Row(name, f"host memory, {told}", State.STUB)


def overlap_rows(cost: "overlap.Cost") -> list[Row]:
    """What people want to know of one loop. Without offloads beside it all the time, nothing was measured."""
    name = f"{cost.loop} loop beside offloads of {cost.pieces}"
    wanted = f", goal: at most {SLOWDOWN_MAX:.0%}" if cost.loop == "matmul" else ""
    found = f"{cost.slowdown:.2%} (turns: {cost.slowdown_low:.2%} to {cost.slowdown_high:.2%}{wanted})"
    measured = cost.offloading_share >= OFFLOADING_SHARE_MIN
    met = measured and (not wanted or cost.slowdown <= SLOWDOWN_MAX)
    if not measured:
        found += f": not measured, an offload was under way only {cost.offloading_share:.0%} of the time"
    return [
        goal(f"{name}: slowdown", found, met),
        goal(f"{name}: time with an offload under way", f"{cost.offloading_share:.1%}", measured),
        Row(f"{name}: offloads", f"{cost.offload_gb_s:.1f} GB/s (alone: {cost.offload_gb_s_alone:.1f})", State.OK),
    ]


def costs() -> Iterator["overlap.Cost"]:
    """What copies cost a model beside them."""
    import overlap
    from compute import DEVICE
    from kvcellar import nvrtc

    pool_dir = Path(tempfile.mkdtemp(dir="/dev/shm"))
    try:
        yield from overlap.measure(
            pool_dir, nvrtc.libraries(), overlap.Size() if DEVICE.type == "cuda" else overlap.TINY
        )
    finally:
        shutil.rmtree(pool_dir)


def main() -> None:
    """Run the part that the arguments name."""
    parser = argparse.ArgumentParser(prog="gpu-check part")
    parser.add_argument("--limit-s", type=float, required=True)
    parser.add_argument("part", choices=["list", "test", "overlap"])
    parser.add_argument("name", nargs="?", default="")
    options = parser.parse_args()
    faulthandler.enable()
    faulthandler.dump_traceback_later(max(1.0, options.limit_s - STACKS_BEFORE_END_S))
    # What tests print is for people.
    out = sys.stdout
    with contextlib.redirect_stdout(sys.stderr):
        if options.part == "list":
            tell(out, [], **listing())
        elif options.part == "test":
            tell(out, [test(options.name)])
        else:
            for cost in costs():
                rows = overlap_rows(cost)
                show(rows)
                tell(out, rows, cost=asdict(cost))


if __name__ == "__main__":
    main()
