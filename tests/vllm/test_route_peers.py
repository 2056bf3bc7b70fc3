"""Several routers before the same engines: they balance, keep sessions and remember prefixes as one router does."""

import contextlib
import json
import signal
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from tests.vllm.fake import Fake
from tests.vllm.processes import wait_until
from tests.vllm.router import Router, open_router
from tests.vllm.server import free_port
from tests.vllm.soak_fleet import Fleet, open_fleet
from tests.vllm.soak_plan import body_of

REQUESTS = 80
# Of 40,000 tokens a second: a prompt is computed for a tenth of a second.
PROMPT_TOKENS = 4_000
# Tokens after which an answer still comes when everything else has happened.
LONG = 2_000


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    """Two engines that compute one prompt after the other."""
    work_dir = tmp_path_factory.mktemp("peers")
    engines = {name: Fake(name, work_dir, one_by_one=True, blocks=20_000) for name in "ab"}
    with open_fleet(work_dir, engines) as made:
        yield made


@contextlib.contextmanager
def opened(
    work_dir: Path, fleet: Fleet, own: int, others: list[int], *flags: str, name: str = "router"
) -> Iterator[Router]:
    """One of several routers."""
    peers = [part for other in others for part in ("--peer", f"http://127.0.0.1:{other}")]
    listen = ["--peer-listen", f"127.0.0.1:{own}"] if others else []
    with open_router(work_dir, "--engines-file", str(fleet.file), *listen, *peers, *flags, name=name) as running:
        running.wait_engines(2)
        yield running


@contextlib.contextmanager
def pair(work_dir: Path, fleet: Fleet, *flags: str) -> Iterator[tuple[Router, Router]]:
    """Two that share."""
    left, right = free_port(), free_port()
    with (
        opened(work_dir, fleet, left, [right], *flags, name="left") as one,
        opened(work_dir, fleet, right, [left], *flags, name="right") as two,
    ):
        wait_sharing(one)
        wait_sharing(two)
        yield one, two


def peers(router: Router) -> list[str]:
    """How it stands with its peers."""
    return list(router.admin.get("/readyz").json()["peers"].values())


def wait_sharing(router: Router) -> None:
    """Waits until all peers share."""
    wait_until(lambda: set(peers(router)) == {"sharing"}, "the peers")


def prompt(number: int, tokens: int = PROMPT_TOKENS) -> list[int]:
    """Shares nothing with another one."""
    return [number * 7 % 1000 + 1] + [(number * 31 + at * 7) % 1000 + 1 for at in range(tokens - 1)]


def ask(router: Router, ids: list[int], session: str = "") -> str:
    """The engine that answered."""
    headers = {"x-session-id": session} if session else {}
    answer = router.client.post("/v1/completions", content=body_of(ids, 2), headers=headers)
    assert answer.status_code == 200, answer.text
    return answer.headers["x-fake-engine"]


def together(routers: list[Router], first: int) -> Counter[str]:
    """Many prompts that nobody has, each by the next router: who got how many."""
    with ThreadPoolExecutor(8) as clients:
        return Counter(clients.map(lambda at: ask(routers[at % len(routers)], prompt(first + at)), range(REQUESTS)))


def test_two_balance_as_one_does(fleet: Fleet, tmp_path: Path) -> None:
    """Eight clients at once, with prompts that all cost the same: half of them go to each engine."""
    with opened(tmp_path, fleet, 0, []) as alone:
        by_one = together([alone], 1000)
    with pair(tmp_path, fleet) as routers:
        by_two = together(list(routers), 2000)
    for counts in by_one, by_two:
        assert min(counts["a"], counts["b"]) >= REQUESTS * 0.4, (by_one, by_two)


def test_each_counts_what_the_other_has_in_flight(fleet: Fleet, tmp_path: Path) -> None:
    """As long as it goes on, and not longer: meanwhile requests go to the engine that has none."""
    with pair(tmp_path, fleet, "--policy", "scorers", "--scorers", "active-requests=1") as (one, two):
        with one.client.stream("POST", "/v1/completions", content=body_of(prompt(1, 99), LONG, stream=True)) as stream:
            pieces = stream.iter_raw()
            next(pieces)
            wait_until(lambda: two.metric("kvcellar_route_peers_in_flight") == 1, "the request")
            assert one.metric("kvcellar_route_peers_in_flight") == 0
            assert two.metric("kvcellar_route_engine_in_flight") == 0, "it is not its own"
            busy = one.metric("kvcellar_route_engine_in_flight", engine="b")
            others = {ask(two, prompt(10 + number, 70)) for number in range(8)}
            assert others == {"a" if busy else "b"}
            assert two.metric("kvcellar_route_peers_in_flight") == 1, "it has ended too soon"
        wait_until(lambda: two.metric("kvcellar_route_peers_in_flight") == 0, "its end")


def test_sessions_and_prefixes_are_the_same_at_both(fleet: Fleet, tmp_path: Path) -> None:
    """By session alone, and by prefix alone."""
    with pair(tmp_path, fleet, "--policy", "scorers", "--scorers", "session=1") as (one, two):
        placed = {f"s{number}": ask(one, prompt(number, 70), f"s{number}") for number in range(12)}
        assert len(set(placed.values())) == 2, "all at one engine by chance"
        wait_caught_up(one, two)
        assert {name: ask(two, prompt(500, 70), name) for name in placed} == placed
    with pair(tmp_path, fleet, "--policy", "scorers", "--scorers", "prefix=1") as (one, two):
        placed_at = {number: ask(one, prompt(3000 + number, 200)) for number in range(12)}
        assert len(set(placed_at.values())) == 2, "all at one engine by chance"
        wait_caught_up(one, two)
        assert {number: ask(two, prompt(3000 + number, 200)) for number in placed_at} == placed_at


def wait_caught_up(one: Router, two: Router) -> None:
    """Waits until the second knows what the first did: blocks are told after sessions."""
    name = "kvcellar_route_engine_remembered_blocks"
    wait_until(lambda: one.metric(name) == two.metric(name) > 0, "the news")


def test_a_dead_routers_share_expires_and_a_new_one_catches_up(fleet: Fleet, tmp_path: Path) -> None:
    """One dies in the middle of a request, and comes back knowing nothing."""
    left, right = free_port(), free_port()
    with opened(tmp_path, fleet, right, [left], name="right") as stays:
        with opened(tmp_path, fleet, left, [right], name="left") as dies:
            wait_sharing(stays)
            wait_sharing(dies)
            placed = {number: ask(stays, prompt(5000 + number, 400), f"t{number}") for number in range(8)}
            assert len(set(placed.values())) == 2, "all at one engine by chance"
            long = body_of(prompt(2, 99), LONG, stream=True)
            with dies.client.stream("POST", "/v1/completions", content=long) as stream:
                pieces = stream.iter_raw()
                next(pieces)
                wait_until(lambda: stays.metric("kvcellar_route_peers_in_flight") == 1, "the request")
                dies.process.send_signal(signal.SIGKILL)
                with contextlib.suppress(httpx.TransportError):
                    list(pieces)
            wait_until(lambda: peers(stays)[0].startswith("silent"), "its silence")
            wait_until(lambda: stays.metric("kvcellar_route_peers_in_flight") == 0, "the end of its share")
            assert stays.metric("kvcellar_route_peers", state="silent") == 1
            assert stays.metric("kvcellar_route_peers_expired_total") == 1
            assert stays.log.read_text().count("silent") == 1, "said once"
            assert stays.admin.get("/readyz").status_code == 200, "it goes on alone"
        with opened(tmp_path, fleet, left, [right], name="again") as again:
            wait_sharing(again)
            wait_sharing(stays)
            wait_until(lambda: again.metric("kvcellar_route_engine_remembered_blocks") > 0, "the snapshot")
            assert {number: ask(again, prompt(5000 + number, 400), f"t{number}") for number in placed} == placed
            decisions = again.decisions()[-len(placed) :]
            assert all(it["predicted_cached"] > 0 for it in decisions), decisions


def test_who_is_no_peer_is_told_so(fleet: Fleet, tmp_path: Path) -> None:
    """Another key, other models, itself."""
    left, right, third = free_port(), free_port(), free_port()
    keys = [tmp_path / name for name in ("key", "other")]
    for key in keys:
        key.write_text(key.name)
    other_file = tmp_path / "other.json"
    with contextlib.ExitStack() as stack:
        stranger = Fake("c", tmp_path, model="another")
        stack.callback(stranger.close)
        stranger.start()
        other_file.write_text(json.dumps([stranger.spec()]))
        one = stack.enter_context(
            opened(tmp_path, fleet, left, [right, third, left], "--peer-key", str(keys[0]), name="one")
        )
        stack.enter_context(opened(tmp_path, fleet, right, [left], "--peer-key", str(keys[1]), name="two"))
        flags = ["--engines-file", str(other_file), "--peer-listen", f"127.0.0.1:{third}"]
        flags += ["--peer", f"http://127.0.0.1:{left}", "--peer-key", str(keys[0])]
        stack.enter_context(open_router(tmp_path, *flags, name="three"))

        def told() -> list[str]:
            return sorted(peers(one))

        wait_until(lambda: len(told()) == 3 and told()[0].startswith("refused: it"), "the answers")
        wait_until(lambda: told()[1].startswith("refused: its engines serve another"), "the models")
        assert "--peer-key" in told()[0] and told()[2] == "this router itself"
        assert one.metric("kvcellar_route_peers", state="refused") == 2
        with httpx.Client(base_url=f"http://127.0.0.1:{left}", trust_env=False) as asks:
            assert asks.get("/peers/v1").status_code == 401
            mine = {"authorization": "Bearer key"}
            assert asks.get("/peers/v1", headers=mine).json()["version"] == 1
            later = asks.get("/peers/v2", headers=mine)
            assert later.status_code == 404 and "version 1" in later.text
