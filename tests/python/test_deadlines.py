"""Patience follows from how slow a machine is, and no test has a deadline beside that."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import deadlines
from tests.deadlines import PACE_MAX, Pace, deadline, shrunk

TESTS = Path(__file__).resolve().parents[1]
# Calls whose first argument is a time to wait, by the end of their names.
WAITS = {"wait", "join", "wait_for", "poll", "ClientTimeout", "timeout"}
# What a client does, not how long it waits for another: it goes away after this.
BEHAVIOUR = {("soak_client.py", "_leave"), ("traffic.py", "_abandon"), ("traffic.py", "run"), ("test_nvme.py", "_run")}
# Carried to machines that have nothing else of the tests: bounded by what runs them.
ELSEWHERE = "hardware"


@pytest.fixture
def pace(monkeypatch: pytest.MonkeyPatch) -> Pace:
    """A pace of its own, as on a good machine."""
    fresh = Pace()
    monkeypatch.setattr(deadlines, "PACE", fresh)
    return fresh


def test_patience_grows_with_what_was_slow_and_never_shrinks(pace: Pace) -> None:
    assert deadline(60.0) == 60.0
    pace.see(180.0, 60.0)
    assert deadline(60.0) == 180.0
    pace.see(1.0, 60.0)
    assert deadline(60.0) == 180.0
    pace.see(1e9, 1.0)
    assert deadline(1.0) == PACE_MAX


def test_loads_shrink_on_slow_machines_only_and_to_their_least_at_most(pace: Pace) -> None:
    assert shrunk(500, 100) == 500
    pace.see(1.9, 1.0)
    assert shrunk(500, 100) == 500
    pace.see(4.0, 1.0)
    assert shrunk(500, 100) == 125
    assert shrunk(500, 200) == 200


def test_the_fixed_work_is_measured() -> None:
    assert deadlines.work_seconds() > 0


def bare(source: str, name: str) -> Iterator[str]:
    """Places where a number is waited for that no pace can scale."""
    tree = ast.parse(source)
    inside = {}
    for function in ast.walk(tree):
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef):
            inside |= {id(node): function.name for node in ast.walk(function)}
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call) or (name, inside.get(id(node))) in BEHAVIOUR:
            continue
        called = getattr(node.func, "attr", getattr(node.func, "id", ""))
        waits = [word.value for word in node.keywords if word.arg in {"timeout", "timeout_s", "total"}]
        waits += node.args[:1] if called in WAITS else []
        if any(isinstance(wait, ast.Constant) and isinstance(wait.value, int | float) and wait.value for wait in waits):
            yield f"{name}:{node.lineno}: {ast.unparse(node)[:80]}"


def test_no_test_waits_for_a_bare_number() -> None:
    files = [path for path in TESTS.rglob("*.py") if ELSEWHERE not in path.parts]
    found = [place for path in files for place in bare(path.read_text(), path.name)]
    assert not found, "say deadline(...):\n" + "\n".join(found)


@pytest.mark.parametrize(
    "line", ["p.wait(15)", "get(u, timeout=120.0)", "asyncio.wait_for(x(), timeout=3)", "s.poll(20_000)"]
)
def test_a_bare_number_is_found(line: str) -> None:
    assert list(bare(line, "a.py"))


@pytest.mark.parametrize("line", ["p.wait()", "get(u, timeout=deadline(120.0))", "p.poll()", "s.poll(POLL_MS)"])
def test_what_can_be_scaled_is_left_alone(line: str) -> None:
    assert not list(bare(line, "a.py"))
