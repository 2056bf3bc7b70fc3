"""What the router does with single faults of engines: behaviours that a soak's sums alone would not tell."""

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import psutil
import pytest

from tests.vllm.fake import Fake
from tests.vllm.fake_faults import HEADER, ID_HEADER, Fault
from tests.vllm.processes import wait_until
from tests.vllm.router import Router, open_router
from tests.vllm.soak_books import read
from tests.vllm.soak_fleet import Fleet, open_fleet
from tests.vllm.soak_plan import body_of

PROMPT = list(range(1, 100))
FAILURES = 6


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    """Two engines."""
    work_dir = tmp_path_factory.mktemp("faults")
    with open_fleet(work_dir, {name: Fake(name, work_dir) for name in "ab"}) as made:
        yield made


@pytest.fixture
def router(fleet: Fleet, tmp_path: Path) -> Iterator[Router]:
    """A router that tries one engine only."""
    flags = ["--engines-file", str(fleet.file), "--mode", "precise", "--tries", "1"]
    with open_router(tmp_path, *flags) as running:
        running.wait_engines(2)
        yield running


def complete(router: Router, number: int, max_tokens: int = 4, fault: str = "") -> httpx.Response:
    """A whole answer."""
    headers = {ID_HEADER: str(number), HEADER: fault} if fault else {ID_HEADER: str(number)}
    return router.client.post("/v1/completions", content=body_of(PROMPT, max_tokens), headers=headers)


def test_a_failure_counts_against_the_engine_that_failed(router: Router, fleet: Fleet) -> None:
    """Not against the one that would have been next, and as no retry where there was none."""
    for number in range(FAILURES):
        answer = complete(router, number, fault=f"{Fault.CLOSE_BEFORE}@*")
        assert (answer.status_code, answer.json()["error"]["type"]) == (502, "upstream")
    places = {number: engines for number, engines in read(fleet.seen).items() if number < FAILURES}
    for name in fleet.engines:
        saw = sum(name in engines for engines in places.values())
        assert router.metric("kvcellar_route_outcomes_total", engine=name, outcome="failed") == saw
    assert len(places) == FAILURES and router.metric("kvcellar_route_retries_total") == 0


def test_a_draining_engine_still_has_its_requests(router: Router, fleet: Fleet) -> None:
    """Whoever waits for its end before taking the engine away sees it; and it comes back at once."""
    specs = [engine.spec(draining=True) for engine in fleet.engines.values()]
    health = lambda: {row["health"] for row in router.admin.get("/debug/engines").json()}  # noqa: E731
    with router.client.stream("POST", "/v1/completions", content=body_of(PROMPT, 900, stream=True)) as stream:
        pieces = stream.iter_raw()
        next(pieces)
        fleet.file.write_text(json.dumps(specs))
        wait_until(lambda: health() == {"draining"}, "the drain")
        assert router.metric("kvcellar_route_engine_in_flight") == 1
        assert router.metric("kvcellar_route_engine_in_flight_tokens") == len(PROMPT)
        refused = complete(router, FAILURES)
        assert (refused.status_code, refused.json()["error"]["type"]) == (503, "no_engine")
        assert b"".join(pieces).endswith(b"data: [DONE]\n\n")
    wait_until(lambda: router.metric("kvcellar_route_engine_in_flight") == 0, "the end of the request")
    fleet.write()
    wait_until(lambda: health() == {"healthy"}, "the end of the drain")


def test_connections_that_nobody_needs_are_closed(router: Router, fleet: Fleet) -> None:
    """Of each engine the one for scrapes stays, and at most one that is being made."""
    ports = {engine.port for engine in fleet.engines.values()}
    process = psutil.Process(router.process.pid)

    def connections() -> int:
        return sum(bool(it.raddr) and it.raddr.port in ports for it in process.net_connections("tcp"))

    with ThreadPoolExecutor(12) as clients:
        answers = [clients.submit(complete, router, FAILURES + number, 100) for number in range(12)]
        assert {answer.result().status_code for answer in answers} == {200}
    assert connections() > 4, "the test sees none"
    wait_until(lambda: connections() <= 4, "the end of idle connections")
