"""The soak's books notice every kind of failure: a soak whose assertions cannot fail proves nothing."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from tests.vllm.metrics import Snapshot
from tests.vllm.soak_books import Books
from tests.vllm.soak_client import End, Record
from tests.vllm.soak_growth import MIB, Growth, Sample

GOOD = [
    Record(1, "proxy", "ids", End.WHOLE, 200, None, 0, "a", "a"),
    Record(2, "envoy", "ids", End.WHOLE, 200, None, 1, "b", "b"),
    Record(3, "proxy", "malformed", End.WHOLE, 400, "bad_request"),
    Record(4, "proxy", "close-before", End.WHOLE, 502, "upstream"),
    Record(5, "proxy", "close-mid", End.BROKEN, 200, None, 3, "a", "a"),
    Record(6, "envoy", "close-mid", End.BROKEN, 200, None, 4, "b", "b"),
    Record(7, "proxy", "error", End.WHOLE, 500, None, 5, "b", "b"),
    Record(8, "proxy", "leave-before", End.LEFT),
]
SEEN = {1: "a", 2: "b", 4: "b", 5: "a", 6: "b", 7: "b"}
COUNTED = {
    "decide_seconds_count{}": 7,
    'refused_total{reason="bad_request"}': 1,
    'requests_total{outcome="done"}': 2,
    'requests_total{outcome="failed"}': 1,
    'requests_total{outcome="broken"}': 1,
    'requests_total{outcome="engine_error"}': 1,
    'requests_total{outcome="aborted"}': 2,
}


def problems(tmp_path: Path, records: list[Record], counted: dict[str, int], seen: dict[int, str]) -> list[str]:
    """What the books say."""
    notes = tmp_path / "seen.jsonl"
    notes.write_text("".join(json.dumps({"id": str(key), "engine": name}) + "\n" for key, name in seen.items()))
    text = "".join(f"kvcellar_route_{name} {count}\n" for name, count in counted.items())
    return Books(records).problems(Snapshot.of_text(text), [notes])


def test_books_that_add_up(tmp_path: Path) -> None:
    """Of the client that left before any engine saw it nothing is certain: it may or may not have been decided on."""
    assert problems(tmp_path, GOOD, COUNTED, SEEN) == []
    undecided = {**COUNTED, "decide_seconds_count{}": 6, 'requests_total{outcome="aborted"}': 1}
    assert problems(tmp_path, GOOD, undecided, SEEN) == []


@pytest.mark.parametrize("name", COUNTED)
@pytest.mark.parametrize("more", [-1, 2])
def test_a_wrong_count_is_noticed(tmp_path: Path, name: str, more: int) -> None:
    assert problems(tmp_path, GOOD, {**COUNTED, name: COUNTED[name] + more}, SEEN)


@pytest.mark.parametrize(
    "record",
    [
        replace(GOOD[0], end=End.STUCK),
        replace(GOOD[0], end=End.WRONG),
        replace(GOOD[0], decision=1),
        replace(GOOD[0], chosen="b"),
        replace(GOOD[0], engine="b", chosen="b"),
        replace(GOOD[0], end=End.BROKEN, status=None, decision=None, engine=None),
        replace(GOOD[0], refusal="bad_request", status=400, decision=None, engine=None, chosen=None),
        replace(GOOD[0], refusal="gateway", status=503, decision=None, engine=None, chosen=None),
    ],
)
def test_a_request_without_a_good_end_is_noticed(tmp_path: Path, record: Record) -> None:
    assert problems(tmp_path, [record, *GOOD[1:]], COUNTED, SEEN)


def test_growth_is_noticed() -> None:
    """Of memory after a third of the time, and of what is held at rest."""

    def growth(*mib: float, fds: int = 30, threads: int = 4) -> list[str]:
        samples = [Sample(int(value * MIB), 30, 4) for value in mib for _ in range(4)]
        # A process is needed for further looks only.
        return Growth(None, 8.0, samples=samples, at_rest=[samples[0], Sample(0, fds, threads)]).problems()  # type: ignore[arg-type]

    assert growth(30, 50, 60, 60, 60, 62) == []
    assert growth(30, 50, 60, 70, 80, 90)
    assert growth(50, 50, 50, 50, 50, 50, fds=80)
    assert growth(50, 50, 50, 50, 50, 50, threads=9)
