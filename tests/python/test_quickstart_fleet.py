"""What `scripts/quickstart --fleet` sends, and what it makes of canned answers. No engine is started."""

import io
import threading
import time
import xml.etree.ElementTree as ET
from itertools import pairwise
from pathlib import Path

import pytest
from quickstart_lib.failure import ServerTroubleError
from quickstart_lib.fleet import arguments, chart, report, talks
from quickstart_lib.fleet.chat import Message, Reply
from quickstart_lib.fleet.measurements import (
    APPROXIMATE,
    PRECISE,
    ROUND_ROBIN,
    WAYS,
    Played,
    Sizes,
    Way,
    compare_texts,
)
from quickstart_lib.fleet.play import Play

ROOT = Path(__file__).resolve().parents[2]
SIZES = Sizes(kv_cache_tokens=3200, dram_tokens=7680, working_set_tokens=12_800)


def given(*more: str) -> arguments.FleetArguments:
    return arguments.parse(["--fleet", *more])


def reply(way: Way, number: int, engine: str, *, ttft_ms: float, cached: int, text: str = "x") -> Reply:
    return Reply(number, ttft_ms / 1000, text, 100, cached, engine, cached, way.prefix_from)


def canned() -> dict[str, Played]:
    """Two conversations of two turns; precise caches most and is fastest."""
    times = {ROUND_ROBIN.name: (400, 0), APPROXIMATE.name: (300, 32), PRECISE.name: (200, 64)}
    played = {}
    for way in WAYS:
        ttft_ms, cached = times[way.name]
        talk = [reply(way, 0, "a", ttft_ms=ttft_ms, cached=0), reply(way, 2, "a", ttft_ms=ttft_ms, cached=cached)]
        other = [reply(way, 1, "b", ttft_ms=ttft_ms, cached=0), reply(way, 3, "b", ttft_ms=ttft_ms, cached=cached)]
        played[way.name] = Played([[talk, other]], dram_tokens=cached)
    return played


def test_the_load_is_seeded_and_shares_system_prompts() -> None:
    first, again, other = (talks.write(given("--seed", seed)) for seed in ("7", "7", "8"))
    assert first == again
    assert first != other
    assert len({talk.system for talk in first}) == 4
    assert len({talk.questions for talk in first}) == len(first) == 24
    assert all(len(talk.system) > 1000 and len(talk.questions) == 4 for talk in first)


def test_a_conversation_is_not_asked_again_at_once() -> None:
    chosen = given()
    order = talks.order(chosen)
    assert order == talks.order(chosen)
    assert sorted(order) == sorted(list(range(24)) * 4)
    early = order[: len(order) // 2]
    assert all(early[at] not in early[max(0, at - 3) : at] for at in range(len(early)))
    assert any(one > two for one, two in pairwise(order)), "they are mixed"


class Echo:
    """An engine that answers with the length of what it got, and notes how many it has at once."""

    def __init__(self, fail_at: int | None = None) -> None:
        self.lock = threading.Lock()
        self.open = self.open_max = self.asked = 0
        self.fail_at = fail_at

    def connect(self) -> "Echo":
        return self

    def close(self) -> None:
        pass

    def ask(self, messages: list[Message]) -> Reply:
        with self.lock:
            number = self.asked
            self.asked += 1
            self.open += 1
            self.open_max = max(self.open_max, self.open)
        if number == self.fail_at:
            raise ServerTroubleError("no")
        time.sleep(0.002)
        with self.lock:
            self.open -= 1
        return Reply(number, 0.1, str(len(messages)), 10, 0, "a", 0, "none")


def test_turns_follow_their_conversation() -> None:
    chosen = given("--conversations", "4", "--turns", "3", "--systems", "2")
    echo = Echo()
    play = Play(talks.write(chosen), talks.order(chosen), echo.connect)  # type: ignore[arg-type]
    done = []
    play.run(3, lambda: done.append(1))
    assert len(done) == 12
    assert echo.open_max > 1
    assert [[it.text for it in replies] for replies in play.replies] == [["2", "4", "6"]] * 4


def test_a_failed_request_ends_the_play() -> None:
    chosen = given("--conversations", "4", "--turns", "3", "--systems", "2")
    echo = Echo(fail_at=2)
    play = Play(talks.write(chosen), talks.order(chosen), echo.connect)  # type: ignore[arg-type]
    with pytest.raises(ServerTroubleError):
        play.run(3, lambda: None)
    assert echo.asked < 12


def test_the_report_says_what_was_measured() -> None:
    played = canned()
    result = report.build(given(), played, compare_texts(played), SIZES)
    precise = result["ways"]["precise"]
    assert precise["ttft_s"] == {"p50": 0.2, "p90": 0.2, "spread": 0.0, "n": 4}
    assert precise["cached_share"] == 128 / 400
    assert precise["engines"] == {name: {"requests": 2, "computed_tokens": 136} for name in ("a", "b")}
    goals = {goal["name"]: goal for goal in result["goals"]}
    assert goals["precise_ttft_p50_over_round_robin"] == {
        "name": "precise_ttft_p50_over_round_robin",
        "goal": "<= 1",
        "value": 0.5,
        "met": True,
    }
    assert result["texts"] == {"conversations": 2, "conversations_equal": 2, "first_turns_equal": 2}
    assert str(ROOT) not in str(result)


def test_overload_does_not_cancel_out_over_rounds() -> None:
    def talks(busy: str, idle: str) -> list[list[Reply]]:
        return [[reply(PRECISE, number, name, ttft_ms=1, cached=0) for number, name in enumerate((busy, busy, idle))]]

    played = Played([talks("a", "b"), talks("b", "a")])
    assert played.requests() == {"a": 3, "b": 3}
    assert [share.requests for share in played.balance()] == [4, 2]
    assert [share.computed_tokens for share in played.balance()] == [400, 200]


def test_texts_that_differ_are_counted() -> None:
    played = canned()
    played[PRECISE.name].talks[0][1][1] = reply(PRECISE, 3, "b", ttft_ms=1, cached=0, text="y")
    texts = compare_texts(played)
    assert (texts.conversations, texts.conversations_equal, texts.first_turns_equal) == (2, 1, 2)


def test_the_verdict_names_what_was_not_shown() -> None:
    pytest.importorskip("rich")
    pytest.importorskip("tokenizers")
    pytest.importorskip("prometheus_client")
    from quickstart_lib.fleet import verdict

    played = canned()
    build = lambda: report.build(given(), played, compare_texts(played), SIZES)  # noqa: E731
    assert verdict.judge(build(), played) == []
    played[ROUND_ROBIN.name] = played[PRECISE.name]
    faults = verdict.judge(build(), played)
    assert any("round robin 32.0%" in fault for fault in faults)
    assert any("looked up otherwise: precise" in fault for fault in faults)


def test_the_table_has_a_row_for_each_way() -> None:
    console_module = pytest.importorskip("rich.console")
    from quickstart_lib.fleet import table

    played = canned()
    console = console_module.Console(width=80, record=True, file=io.StringIO())
    table.show(console, report.build(given(), played, compare_texts(played), SIZES))
    times, tokens = (line for line in console.export_text().splitlines() if "│ precise " in line)
    assert times.count("200 ms") == 2
    assert "32%" in tokens
    assert "136 / 136" in tokens


def test_the_chart_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "chart.svg"
    chart.write(canned(), "a footnote", path)
    texts = [it.text for it in ET.parse(path).iter("{http://www.w3.org/2000/svg}text")]  # noqa: S314
    assert all(way.name in texts for way in WAYS)
    assert "a footnote" in texts
    assert "32%" in texts
