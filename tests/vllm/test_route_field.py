"""What was reported of other routers, played to ours: engines, clients and fleets.

`docs/field-reports.md` lists the reports.
"""

import contextlib
import json
import socket
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import httpx
import pytest
import zmq

from tests.deadlines import deadline
from tests.vllm.fake import Fake
from tests.vllm.fake_faults import HEADER, Fault
from tests.vllm.processes import wait_until
from tests.vllm.router import Router, open_router
from tests.vllm.soak_fleet import Fleet, open_fleet

ASKED = 20
# Of the router: failures in a row after which an engine gets no requests, and for how long.
FAILURES_MAX = 5
# Of the router: how long engines may take in all to tell token ids.
IDS_WITHIN_S = 0.5


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    """Two engines with a model each."""
    work_dir = tmp_path_factory.mktemp("field")
    with open_fleet(work_dir, {name: Fake(name, work_dir, model=f"m-{name}") for name in "ab"}) as made:
        yield made


@pytest.fixture
def a_and_b(fleet: Fleet) -> Iterator[tuple[Fake, Fake]]:
    """Both, well again afterwards."""
    yield fleet.engines["a"], fleet.engines["b"]
    for engine in fleet.engines.values():
        engine.tell("/mode", listening=True)


@contextlib.contextmanager
def routed(work_dir: Path, fleet: Fleet, *flags: str, engines: list[dict[str, Any]] | None = None) -> Iterator[Router]:
    """A router in front of both."""
    file = work_dir / "engines.json"
    file.write_text(json.dumps(engines or [engine.spec() for engine in fleet.engines.values()]))
    with open_router(work_dir, "--engines-file", str(file), *flags) as running:
        running.wait_engines(len(fleet.engines))
        yield running


def post(router: Router, path: str = "/v1/completions", **body: Any) -> httpx.Response:
    """One request; of no model unless one is named, so that any engine may have it."""
    given = body or {"prompt": list(range(1, 130)), "max_tokens": 2}
    return router.client.post(path, json=given)


def engine_of(answer: httpx.Response) -> str:
    """Who answered."""
    return answer.headers["x-fake-engine"]


def health(router: Router, name: str) -> str:
    """As the router sees it."""
    rows = {row["name"]: row["health"] for row in router.admin.get("/debug/engines").json()}
    return str(rows[name])


@pytest.mark.parametrize("path", ["/v1/messages", "/v1/responses", "/v1/embeddings", "/rerank", "/tokenize"])
def test_every_body_goes_where_its_model_is(
    fleet: Fleet, a_and_b: tuple[Fake, Fake], tmp_path: Path, path: str
) -> None:
    turns = [{"role": "user", "content": "What is a block"}]
    bodies: dict[str, dict[str, Any]] = {
        "/v1/messages": {"messages": turns, "max_tokens": 2},
        "/v1/responses": {"input": "What is a block", "max_tokens": 2},
        "/tokenize": {"prompt": "What is a block"},
    }
    with routed(tmp_path, fleet) as router:
        for model in ["m-a", "m-b"] * (ASKED // 2):
            answer = post(router, path, model=model, **bodies.get(path, {"input": ["x"]}))
            assert (answer.status_code, engine_of(answer)) == (200, model[-1])
        unknown = post(router, path, model="m-c", **bodies.get(path, {"input": ["x"]}))
        # Where the path is known to be a prompt the router can say it; else the engine is asked.
        assert unknown.status_code == (404 if path in {"/v1/messages", "/v1/responses"} else 200)


@pytest.mark.parametrize("path", ["/v1/messages", "/v1/responses"])
def test_a_conversation_of_another_api_finds_its_prefix(
    fleet: Fleet, a_and_b: tuple[Fake, Fake], tmp_path: Path, path: str
) -> None:
    long = " ".join(f"word{number}" for number in range(100))
    turns = [{"role": "user", "content": long}]
    body: dict[str, Any] = {"messages": turns, "system": "Be brief."}
    if path == "/v1/responses":
        body = {"input": turns, "instructions": "Be brief."}
    with routed(tmp_path, fleet, "--mode", "precise") as router:
        first = post(router, path, model="m-a", max_tokens=2, **body)
        assert first.status_code == 200, first.text

        def hits() -> bool:
            post(router, path, model="m-a", max_tokens=2, **body)
            return bool(router.decisions()[-1]["predicted_cached"] >= 96)

        wait_until(hits, "a hit that was foreseen")
        last = router.decisions()[-1]
        assert (last["prefix_from"], last["tokens_from"]) == ("precise", "remote")
        assert last["reported_cached"] == last["predicted_cached"]
        # The same words as a chat are the same prompt.
        chat = [{"role": "system", "content": "Be brief."}, *turns]
        assert post(router, "/v1/chat/completions", model="m-a", max_tokens=2, messages=chat).status_code == 200
        assert router.decisions()[-1]["predicted_cached"] == last["predicted_cached"]


def test_an_engine_that_answers_503_costs_its_clients_nothing(
    fleet: Fleet, a_and_b: tuple[Fake, Fake], tmp_path: Path
) -> None:
    a, _ = a_and_b
    with routed(tmp_path, fleet) as router:
        # It is wanted: it has the prefix.
        prompt = {"prompt": list(range(1, 1000)), "max_tokens": 2}
        while engine_of(post(router, **prompt)) != "a":
            prompt["prompt"] = [token + 1000 for token in prompt["prompt"]]  # type: ignore[attr-defined]
        a.tell("/mode", fault=Fault.UNAVAILABLE)
        answers = [post(router, **prompt) for _ in range(ASKED)]
        assert {(answer.status_code, engine_of(answer)) for answer in answers} == {(200, "b")}
        assert "a: its requests fail: it gets none for" in router.log.read_text()
        retried = router.metric("kvcellar_route_retries_total", engine="a")
        assert FAILURES_MAX <= retried < ASKED, "it was left alone"
        a.tell("/mode", fault=Fault.NONE)

        def is_back() -> bool:
            post(router, prompt=[Random(time.monotonic_ns()).randrange(1000) for _ in range(40)], max_tokens=1)
            return "a: answers requests again" in router.log.read_text()

        wait_until(is_back, "a trial")
        assert (health(router, "a"), router.metric("kvcellar_route_engine_broken", engine="a")) == ("healthy", 0)


def test_a_request_that_all_refuse_gets_an_engines_own_answer(
    fleet: Fleet, a_and_b: tuple[Fake, Fake], tmp_path: Path
) -> None:
    with routed(tmp_path, fleet) as router:
        fault = {HEADER: f"{Fault.UNAVAILABLE}@*"}
        body = {"prompt": [1, 2, 3], "max_tokens": 1}
        answer = router.client.post("/v1/completions", json=body, headers=fault)
        assert (answer.status_code, answer.json()["error"]["message"]) == (503, "as told")
        # One that kills an engine must not be shown to the whole fleet.
        broken = router.client.post("/v1/completions", json=body, headers={HEADER: f"{Fault.CLOSE_BEFORE}@*"})
        assert broken.status_code == 502
        # A 500 may be the request's own doing: it is passed on, and says nothing of the engine.
        for _ in range(2 * FAILURES_MAX):
            own = router.client.post("/v1/completions", json=body, headers={HEADER: f"{Fault.ERROR}@*"})
            assert own.status_code == 500
        assert {health(router, name) for name in "ab"} == {"healthy"}


def test_stalled_token_ids_are_not_waited_for(fleet: Fleet, a_and_b: tuple[Fake, Fake], tmp_path: Path) -> None:
    chat = {"messages": [{"role": "user", "content": "What is a block"}], "max_tokens": 1}
    with routed(tmp_path, fleet, "--mode", "precise") as router:
        assert post(router, "/v1/chat/completions", **chat).status_code == 200
        assert router.decisions()[-1]["tokens_from"] == "remote"
        for engine in a_and_b:
            engine.tell("/mode", render="hang")
        for _ in range(ASKED):
            assert post(router, "/v1/chat/completions", **chat).status_code == 200
        late = [row for row in router.decisions()[-ASKED:] if row["took_us"] >= IDS_WITHIN_S * 1e6]
        assert {row["tokens_from"] for row in router.decisions()[-ASKED:]} == {"estimate"}
        # Each engine is waited for once, and then left alone for a while.
        assert 1 <= len(late) <= 2 * len(a_and_b), late


def test_numbers_reach_the_engines_tokenizer_as_they_were_written(
    fleet: Fleet, a_and_b: tuple[Fake, Fake], tmp_path: Path
) -> None:
    raw = (
        '{"messages": [{"role": "user", "content": "x"}], "max_tokens": 1, "tools": [{"type": "function", "function":'
        ' {"name": "f", "parameters": {"maximum": 18446744073709551616, "multipleOf": 1.10}}}]}'
    )
    with routed(tmp_path, fleet, "--mode", "precise") as router:
        answer = router.client.post("/v1/chat/completions", content=raw)
        assert answer.status_code == 200
        assert router.decisions()[-1]["tokens_from"] == "remote"
        bodies = {engine.operator.get("/state").json()["last_body"] for engine in a_and_b}
        assert raw in bodies


def test_an_engine_without_metrics_is_used(fleet: Fleet, a_and_b: tuple[Fake, Fake], tmp_path: Path) -> None:
    for engine in a_and_b:
        engine.tell("/mode", metrics="missing")
    with routed(tmp_path, fleet) as router:
        assert post(router).status_code == 200
        assert router.log.read_text().count("it has no /metrics") == len(a_and_b), "said once for each"


@pytest.mark.timeout(deadline(120))
def test_events_that_do_not_come_are_said(fleet: Fleet, a_and_b: tuple[Fake, Fake], tmp_path: Path) -> None:
    with zmq.Context() as context, context.socket(zmq.PUB) as silent, socket.socket() as unused:
        port = silent.bind_to_random_port("tcp://127.0.0.1")
        # Bound, but nobody accepts: it stays free, and refuses.
        unused.bind(("127.0.0.1", 0))
        specs = [engine.spec() for engine in a_and_b]
        for spec, events in zip(specs, (port, unused.getsockname()[1]), strict=True):
            spec["events"] = f"tcp://127.0.0.1:{events}"
            del spec["replay"]
        with routed(tmp_path, fleet, "--mode", "precise", engines=specs) as router:
            for model in ("m-a", "m-b"):
                assert post(router, model=model, prompt=list(range(1, 130)), max_tokens=1).status_code == 200
            assert router.decisions()[-1]["prefix_from"] == "none"
            faults = {"a": "silent", "b": "down"}
            wait_until(lambda: router.admin.get("/readyz").json()["events_missing"] == faults, "both faults")
            assert router.metric("kvcellar_route_events_connected", engine="a") == 1
            assert router.metric("kvcellar_route_events_connected", engine="b") == 0
            wait_until(lambda: "bring nothing although" in router.log.read_text(), "the warning")
            wait_until(lambda: "cannot be reached" in router.log.read_text(), "the other warning")
            time.sleep(2)
            assert router.log.read_text().count("its events (") == 2, "each is said once"


def test_events_that_come_have_an_age(fleet: Fleet, a_and_b: tuple[Fake, Fake], tmp_path: Path) -> None:
    with routed(tmp_path, fleet, "--mode", "precise") as router:
        prompt = [Random(7).randrange(1000) for _ in range(130)]
        assert post(router, model="m-a", prompt=prompt, max_tokens=1).status_code == 200
        wait_until(lambda: "kvcellar_route_events_age_seconds{" in router.admin.get("/metrics").text, "an age")
        assert router.admin.get("/readyz").json()["events_missing"] == {}


@pytest.mark.parametrize("fault", [Fault.NONE, Fault.UNAVAILABLE, Fault.CLOSE_BEFORE, Fault.ERROR])
def test_a_prompt_that_nobody_hands_over_is_computed_where_it_is_needed(
    fleet: Fleet, a_and_b: tuple[Fake, Fake], tmp_path: Path, fault: Fault
) -> None:
    """The prefill engine knows nothing of transfers, or is ill: the client does not notice."""
    a, b = a_and_b
    engines = [{**a.spec(), "role": "prefill"}, {**b.spec(), "role": "decode"}]
    a.tell("/mode", fault=fault)
    with routed(tmp_path, fleet, "--prefill-tokens", "1", engines=engines) as router:
        answers = [post(router) for _ in range(2 * FAILURES_MAX)]
        assert {(answer.status_code, engine_of(answer)) for answer in answers} == {(200, "b")}
        assert {row["prefill"] for row in router.decisions()} == {None}
        failed = router.metric("kvcellar_route_prefills_total", engine="a", outcome="failed")
        is_ill = fault in {Fault.UNAVAILABLE, Fault.CLOSE_BEFORE}
        assert FAILURES_MAX <= failed < 2 * FAILURES_MAX if is_ill else failed == 2 * FAILURES_MAX
        assert is_ill == ("a: its requests fail" in router.log.read_text())
        assert router.metric("kvcellar_route_engine_in_flight") == 0


def test_repeated_headers_reach_the_engine(fleet: Fleet, a_and_b: tuple[Fake, Fake], tmp_path: Path) -> None:
    with routed(tmp_path, fleet) as router:
        hops = ["10.0.0.1", "10.0.0.2"]
        headers = [("content-type", "application/json"), *(("x-forwarded-for", hop) for hop in hops)]
        # What the router says to engines is not a client's to say.
        headers += [("x-prefiller-host-port", "10.0.0.9:1"), ("x-data-parallel-rank", "7")]
        body = json.dumps({"prompt": [1, 2, 3], "max_tokens": 1})
        answer = router.client.post("/v1/completions", content=body, headers=headers)
        state = fleet.engines[engine_of(answer)].operator.get("/state").json()
        assert state["last_headers"]["x-forwarded-for"] == hops
        assert not state["last_headers"].keys() & {"x-prefiller-host-port", "x-data-parallel-rank"}
        assert router.client.get("/v1/%2e%2E/admin").status_code == 400


def test_models_share_a_name_by_weight(fleet: Fleet, a_and_b: tuple[Fake, Fake], tmp_path: Path) -> None:
    """Sessions stay with one; and where one is gone, the other has all."""
    asked = 3 * ASKED
    body = {"model": "chat", "prompt": [1, 2, 3], "max_tokens": 1}
    with routed(tmp_path, fleet, "--alias", "chat=m-a@3", "--alias", "chat=m-b@1") as router:
        ask = lambda **headers: engine_of(router.client.post("/v1/completions", json=body, headers=headers))  # noqa: E731
        found = Counter(ask() for _ in range(asked))
        # Of 60 draws at 3 to 1, fewer than 2 or more than 33 for b happen once in a million times.
        assert 2 <= found["b"] <= asked // 2 + 3, found
        for session in range(ASKED):
            assert len({ask(**{"x-session-id": str(session)}) for _ in range(3)}) == 1
        counted = {model: router.metric("kvcellar_route_aliased_total", model=model) for model in ("m-a", "m-b")}
        assert sum(counted.values()) == asked + 3 * ASKED and counted["m-b"] >= found["b"]
        a_and_b[1].kill()
        try:
            wait_until(lambda: health(router, "b") != "healthy", "the end of b")
            assert {ask() for _ in range(ASKED)} == {"a"}
        finally:
            a_and_b[1].start()


def test_a_model_has_other_names(fleet: Fleet, a_and_b: tuple[Fake, Fake], tmp_path: Path) -> None:
    with routed(tmp_path, fleet, "--alias", "large=m-b", "--alias", "nobodys=m-c") as router:
        raw = '{"model": "large", "prompt": [1, 2, 3], "max_tokens": 1, "seed": 18446744073709551616}'
        for _ in range(FAILURES_MAX):
            assert engine_of(router.client.post("/v1/completions", content=raw)) == "b"
        body = a_and_b[1].operator.get("/state").json()["last_body"]
        assert '"model":"m-b"' in body and "18446744073709551616" in body
        listed = [row["id"] for row in router.client.get("/v1/models").json()["data"]]
        assert sorted(listed) == ["large", "m-a", "m-b"], "what nobody serves is not listed"
        assert post(router, model="nobodys", prompt=[1], max_tokens=1).status_code == 404


def test_a_target_that_is_no_path_blames_no_engine(fleet: Fleet, a_and_b: tuple[Fake, Fake], tmp_path: Path) -> None:
    with routed(tmp_path, fleet) as router:
        port = httpx.URL(router.http).port
        for _ in range(2 * FAILURES_MAX):
            with socket.create_connection(("127.0.0.1", port)) as client:
                client.sendall(b"OPTIONS * HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")
                assert client.recv(1024).startswith(b"HTTP/1.1 400")
        assert {health(router, name) for name in "ab"} == {"healthy"}
        assert post(router).status_code == 200


def test_engines_of_one_name_are_refused(fleet: Fleet, a_and_b: tuple[Fake, Fake], tmp_path: Path) -> None:
    """At the start; and later the engines stay as they were."""
    twice = [{**engine.spec(), "name": "a"} for engine in a_and_b]
    with pytest.raises(AssertionError, match="two engines are called `a`"), routed(tmp_path, fleet, engines=twice):
        pass
    with routed(tmp_path, fleet) as router:
        (tmp_path / "engines.json").write_text(json.dumps(twice))
        wait_until(lambda: "two engines are called `a`" in router.log.read_text(), "the warning")
        assert {health(router, name) for name in "ab"} == {"healthy"}
