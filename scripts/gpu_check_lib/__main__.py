"""Runs the stages of a plan: one table, one JSON file.

Each stage's work runs in processes of its own and for a limited time: one that crashes, hangs or ruins the GPU's
context costs nothing of the others. What a stage found is printed and written as it is found.
"""

import argparse
import shutil
import sys
import tempfile
import time
from pathlib import Path

from gpu_check_lib.plans import PLANS
from gpu_check_lib.report import Report
from gpu_check_lib.serving import Serving, new_store
from gpu_check_lib.stages import WHAT, Place, Stages, build_stub, why_no_gpu
from gpu_check_lib.table import Row, State, show

# With less than this a stage is not begun.
STAGE_MIN_S = {"facts": 1.0, "smoke": 5.0, "copies": 10.0, "bus": 15.0, "correct": 40.0, "speed": 60.0, "graphs": 40.0}
SOAK_MIN_S = 90.0


def run_stages(stages: Stages, report: Report, began: float, only: list[str]) -> None:
    """All stages of the plan, each within its own limit and what is left of the whole."""
    for stage, limit_s in stages.plan.stages.items():
        if only and stage not in only:
            continue
        report.begin(stage, WHAT[stage])
        left_s = stages.plan.total_s - (time.monotonic() - began)
        reason = stages.place.why_not(stage)
        if reason is None and left_s < STAGE_MIN_S.get(stage, SOAK_MIN_S):
            reason = f"no time: {left_s:.0f} s are left"
        if reason is not None:
            report.add(stage, [Row(stage, reason, State.SKIPPED)])
            continue
        try:
            stages.run(stage, report, min(limit_s, left_s))
        except Exception as error:  # noqa: BLE001 - a stage that dies is a row
            report.add(stage, [Row(stage, f"the check itself failed: {error!r}", State.FAILED)])


def main() -> int:
    """Run the plan. Goals that are missed are shown, and only failures make the exit code 1."""
    parser = argparse.ArgumentParser(prog="gpu-check")
    parser.add_argument("--plan", choices=sorted(PLANS), default="full")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--store", type=Path)
    parser.add_argument("--commit", default="unknown")
    parser.add_argument("--only", default="")
    parser.add_argument("binaries", nargs="*")
    options = parser.parse_args()
    only = [stage for stage in options.only.split(",") if stage]
    if unknown := set(only) - set(WHAT):
        parser.error(f"no such stage: {', '.join(sorted(unknown))}; there are {', '.join(WHAT)}")
    began = time.monotonic()
    options.out.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix="kvcellar-check-"))
    store = new_store(options.store)
    no_gpu = why_no_gpu()
    place = Place(no_gpu, tuple(options.binaries), build_stub(scratch) if no_gpu is not None else None)
    plan = PLANS[options.plan]
    report = Report(
        options.out / "gpu-check.json",
        {"complete": False, "plan": options.plan, "commit": options.commit, "no_gpu": no_gpu, "stages": {}},
    )
    try:
        serving = Serving(plan, options.out / "gpu-check.log", store)
        run_stages(Stages(plan, place, serving), report, began, only)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
        shutil.rmtree(store, ignore_errors=True)
    report.whole |= {"complete": True, "seconds": round(time.monotonic() - began, 1)}
    report.write()
    sys.stderr.flush()
    print(f"\ngpu-check --plan {options.plan}: {report.whole['seconds']:.0f} s", flush=True)
    if no_gpu is not None:
        print(f"{no_gpu}. NOTHING BELOW IS A MEASUREMENT OF A GPU.", flush=True)
    show(report.rows)
    return 1 if report.failed else 0


if __name__ == "__main__":
    sys.exit(main())
