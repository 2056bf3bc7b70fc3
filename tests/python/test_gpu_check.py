"""What `scripts/gpu-check` is made of: rows fail when they should, limits hold, the report is always whole."""

import json
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from gpu_check_lib import __main__ as check
from gpu_check_lib import serving, verdicts
from gpu_check_lib.cell import SHAPES, Cell, Phase, Scenario
from gpu_check_lib.child import Ended, run
from gpu_check_lib.plans import PLANS, Plan
from gpu_check_lib.report import Report
from gpu_check_lib.serving import Serving, cells
from gpu_check_lib.stages import WHAT, Place, Stages
from gpu_check_lib.table import Row, State

from tests.deadlines import deadline

CELL = Cell("cell", Scenario.CORRECT, lengths=(96,), runs=2)


def answer(**changes: Any) -> dict[str, Any]:
    return {"length": 96, "expected": 80, "own_cached": 80, "cached": 80, "same": True, "distinct": 5} | changes


def timed(hit: float, own: float, rate: float) -> list[dict[str, Any]]:
    """What one engine told: a hit in a tier, one in vLLM's own cache, tokens a second."""
    ms = {name: {"median": value, "min": value, "max": value} for name, value in (("tier_hit", hit), ("own_hit", own))}
    return [
        {"length": 2048, "expected": 2032, "cached": [2032], "same": 3, "runs": 3, "ms": ms},
        {"load_round": 0, "tokens_per_s": rate},
    ]


def states(rows: list[Row]) -> list[State]:
    return [row.state for row in rows]


def test_plans_fit_into_their_minutes_and_name_what_there_is() -> None:
    assert PLANS["first"].total_s <= 9 * 60
    assert PLANS["again"].total_s <= 4 * 60
    names = {cell.name for cell in cells()}
    assert len(names) == len(cells())
    for plan in PLANS.values():
        assert set(plan.cells) <= names
        assert list(plan.stages) == [stage for stage in WHAT if stage in plan.stages]
        assert {Phase(phase) for phase in plan.phases}


def test_a_cell_comes_over_a_command_line_as_it_was() -> None:
    for cell in cells():
        assert Cell.of(cell.as_json()) == cell


def test_engines_that_run_beside_each_other_do_not_share_their_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # All below one pool_dir get `dram_size` together: the second of two would be served without its tier.
    dirs: list[Path] = []

    def asked(command: list[str], *_: object) -> Ended:
        (extra,) = [(Cell.of(command[-1]).connector() or {})["kv_connector_extra_config"]]
        dirs.append(Path(extra["pool_dir"]))
        assert dirs[-1].is_dir()
        return Ended(0, "", "", 0.0)

    monkeypatch.setattr(serving, "run", asked)
    report = Report(tmp_path / "gpu-check.json", {"complete": False, "stages": {}})
    report.begin("correct", "")
    Serving(PLANS["full"], tmp_path / "log", tmp_path).correct(report, 60.0)
    assert len(set(dirs)) == len(dirs) > 1
    assert not any(path.exists() for path in dirs)


def test_a_crowd_is_larger_than_the_cache_that_others_blocks_lie_in() -> None:
    for cell in cells():
        tokens = cell.kv_bytes // SHAPES[cell.shape].token_bytes
        assert max(cell.lengths) + 256 <= tokens < cell.crowd * max(cell.lengths)


@pytest.mark.parametrize(
    ("told", "why", "state"),
    [
        ([answer(), answer()], None, State.OK),
        ([answer(), answer(same=False)], None, State.FAILED),
        ([answer(), answer(cached=64)], None, State.FAILED),
        ([answer(), answer(own_cached=0)], None, State.FAILED),
        ([answer()], None, State.FAILED),
        ([], None, State.FAILED),
        ([answer(), answer()], "ended by SIGSEGV", State.FAILED),
    ],
)
def test_a_cell_is_right_only_with_every_answer(told: list[dict[str, Any]], why: str | None, state: State) -> None:
    assert verdicts.correct(CELL, told, why).state is state


def test_answers_that_prove_little_say_so() -> None:
    assert "prove little" in verdicts.correct(CELL, [answer(distinct=1)] * 2, None).found


def test_a_soak_fails_for_a_wrong_answer_and_not_for_a_miss() -> None:
    told = {"rounds": 3, "answers": 9, "wrong": 0, "misses": 4}
    assert verdicts.soak(CELL, [told], None).state is State.OK
    assert verdicts.soak(CELL, [told | {"wrong": 1}], None).state is State.FAILED
    assert verdicts.soak(CELL, [told | {"rounds": 0}], None).state is State.FAILED
    assert verdicts.soak(CELL, [], None).state is State.FAILED


def test_goals_compare_engines_of_one_run() -> None:
    # 2,048 tokens of 128 KiB at 50 GB/s take 5.4 ms.
    good = verdicts.compared(
        (2048,),
        "8b",
        {"ours": [timed(10, 5, 99.5)], "native": [timed(11, 5, 99)], "plain": [timed(0, 0, 100)] * 2},
        50.0,
    )
    assert states(good) == [State.OK] * 3
    bad = verdicts.compared(
        (2048,), "8b", {"ours": [timed(12, 5, 98)], "native": [timed(11, 5, 99)], "plain": [timed(0, 0, 100)] * 2}, 50.0
    )
    assert states(bad) == [State.MISSED] * 3
    # What was not measured is no goal, met or missed.
    assert verdicts.compared((2048,), "8b", {"ours": [timed(12, 5, 98)]}, None) == []


def test_an_engine_that_answers_otherwise_after_a_hit_fails() -> None:
    told = timed(10, 5, 100)
    cell = CELL.with_(phase=Phase.OURS)
    assert State.FAILED not in states(verdicts.speed(cell, told, None))
    assert State.FAILED in states(verdicts.speed(cell, [told[0] | {"same": 2}], None))
    assert State.FAILED in states(verdicts.speed(cell, [told[0] | {"cached": [2016]}], None))
    assert State.FAILED in states(verdicts.speed(cell, [], None))
    assert State.FAILED in states(verdicts.speed(cell, told, "out of time"))


def test_what_a_child_started_ends_with_it(tmp_path: Path) -> None:
    pid = tmp_path / "pid"
    grandchild = f"import os, time; open({str(pid)!r}, 'w').write(str(os.getpid())); time.sleep(600)"
    child = f"import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', {grandchild!r}]); time.sleep(600)"
    ended = run([sys.executable, "-c", child], deadline(4.0))
    assert ended.status is None
    assert "out of time" in ended.why
    end = time.monotonic() + deadline(5.0)
    while Path(f"/proc/{pid.read_text()}").exists() and "Z" not in Path(f"/proc/{pid.read_text()}/stat").read_text():
        assert time.monotonic() < end, "it is still there"
        time.sleep(0.01)


def plan_of(**stages: float) -> Plan:
    return Plan(100.0, stages, (), 8, 1, (), (96,), 1, ("plain",))


def test_a_stage_that_dies_is_a_row_and_the_others_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def die(*_: object) -> None:
        raise OSError("the disk is gone")

    plan = plan_of(facts=10.0, smoke=10.0, correct=10.0)
    report = Report(tmp_path / "gpu-check.json", {"complete": False, "stages": {}})
    stages = Stages(plan, Place("no GPU", (), None), Serving(plan, tmp_path / "log", tmp_path))
    monkeypatch.setattr(Stages, "_facts", die)
    check.run_stages(stages, report, time.monotonic(), [])
    written = json.loads((tmp_path / "gpu-check.json").read_text())
    assert [(row.name, row.state) for row in report.rows] == [
        ("facts", State.FAILED),
        ("kernels of vLLM", State.SKIPPED),
        ("a block's way over the stub", State.SKIPPED),
        ("correct", State.SKIPPED),
    ]
    assert "the disk is gone" in written["stages"]["facts"]["rows"][0]["found"]
    assert report.failed


def test_what_has_no_time_left_is_skipped_and_says_so(tmp_path: Path) -> None:
    plan = plan_of(facts=10.0)
    report = Report(tmp_path / "gpu-check.json", {"complete": False, "stages": {}})
    stages = Stages(plan, Place(None, (), None), Serving(plan, tmp_path / "log", tmp_path))
    check.run_stages(stages, report, time.monotonic() - 100.0, [])
    assert states(report.rows) == [State.SKIPPED]
    assert "no time" in report.rows[0].found
