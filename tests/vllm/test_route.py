"""The router in front of two real engines: as a reverse proxy, and as the endpoint picker of a real Envoy."""

import json
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from random import Random
from typing import Any

import httpx
import pytest

from tests.vllm.places import real_model, temporary_pool_dir
from tests.vllm.processes import wait_until
from tests.vllm.router import Router, open_envoy, open_router
from tests.vllm.server import BLOCK_TOKENS, Server, free_port, open_server
from tests.vllm.sizes import kv_mib

WORDS = [
    "a",
    "the",
    "river",
    "stone",
    "light",
    "runs",
    "over",
    "under",
    "quiet",
    "morning",
    "bird",
    "answers",
    "slowly",
    "and",
    "then",
    "again",
    "of",
    "many",
    "small",
    "things",
]


def words(random: Random, count: int) -> str:
    """Text of about as many tokens."""
    return " ".join(random.choice(WORDS) for _ in range(count))


class Fleet:
    """Two engines that can be stopped and started again on their ports."""

    def __init__(self, work_dir: Path, pool_dir: Path) -> None:
        """Starts none."""
        self.work_dir, self.pool_dir = work_dir, pool_dir
        self.ports = {name: (free_port(), free_port(2)) for name in "ab"}
        self.lives: dict[str, tuple[ExitStack, Server]] = {}

    def start(self, name: str) -> Server:
        """Starts an engine. Engines of one directory share `dram_size`, so each has a directory of its own."""
        ends = ExitStack()
        port, events = self.ports[name]
        pool_dir = self.pool_dir / name
        pool_dir.mkdir(mode=0o700, exist_ok=True)
        server = ends.enter_context(
            open_server(
                self.work_dir,
                pool_dir,
                cellar={"dram_size": kv_mib(64), "namespace_salt": name},
                name=f"{name}-{time.monotonic_ns()}",
                port=port,
                events_port=events,
            )
        )
        self.lives[name] = (ends, server)
        return server

    def stop(self, name: str) -> None:
        """Stops an engine."""
        self.lives.pop(name)[0].close()

    def flags(self) -> list[str]:
        """How a router finds both."""
        found = []
        for name, (port, events) in self.ports.items():
            spec = f"name={name},url=http://127.0.0.1:{port}"
            found += ["--engine", f"{spec},events=tcp://127.0.0.1:{events},replay=tcp://127.0.0.1:{events + 1}"]
        return found

    def reset(self) -> None:
        """Empties the engines' caches. An idle vLLM tells of that with its next step only, so each gets one."""
        for _, server in self.lives.values():
            assert server.reset(external=True)
            server.complete([1, 2, 3], max_tokens=1)


@pytest.fixture(scope="module")
def fleet(vllm_installed: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    """Both engines, running."""
    with temporary_pool_dir() as pool_dir:
        engines = Fleet(tmp_path_factory.mktemp("fleet"), pool_dir)
        try:
            starts = [threading.Thread(target=engines.start, args=(name,)) for name in "ab"]
            for start in starts:
                start.start()
            for start in starts:
                start.join()
            yield engines
        finally:
            for name in list(engines.lives):
                engines.stop(name)


PICKER_CONFIG = """
apiVersion: llm-d.ai/v1
kind: EndpointPickerConfig
plugins:
- type: single-profile-handler
- type: precise-prefix-cache-scorer
- type: queue-scorer
- type: kv-cache-utilization-scorer
- type: no-hit-lru-scorer
- type: max-score-picker
schedulingProfiles:
- name: default
  plugins:
  - {pluginRef: precise-prefix-cache-scorer, weight: 3}
  - {pluginRef: queue-scorer, weight: 2}
  - {pluginRef: kv-cache-utilization-scorer, weight: 2}
  - {pluginRef: no-hit-lru-scorer, weight: 0.1}
  - {pluginRef: max-score-picker}
"""


@pytest.fixture
def router(fleet: Fleet, tmp_path: Path) -> Iterator[Router]:
    """A precise router, as a file says. By scorers: what the cost model makes of short prompts depends on noise."""
    config = tmp_path / "picker.yaml"
    config.write_text(PICKER_CONFIG)
    flags = [*fleet.flags(), "--picker-config", str(config), "--tokenizer", str(real_model()), "--body", "8MiB"]
    flags += ["--alias", "nick=model"]
    with open_router(tmp_path, *flags) as running:
        running.wait_engines(2)
        yield running


def chat_body(content: str, *, stream: bool = False, max_tokens: int = 4) -> dict[str, Any]:
    """A chat request."""
    body: dict[str, Any] = {
        "model": "model",
        "messages": [{"role": "user", "content": content}],
        "max_tokens": max_tokens,
    }
    body |= {"temperature": 0, "ignore_eos": True}
    if stream:
        body |= {"stream": True, "stream_options": {"include_usage": True}}
    return body


def events_of(text: str) -> list[dict[str, Any]]:
    """The chunks of a stream, without its end mark."""
    lines = [line.removeprefix("data: ") for line in text.split("\n\n") if line]
    assert lines[-1] == "[DONE]", lines[-1:]
    return [json.loads(line) for line in lines[:-1]]


def chat(client: httpx.Client, content: str, *, stream: bool) -> tuple[str, dict[str, Any], httpx.Headers]:
    """The answer's text, its usage and its headers."""
    headers = {"x-kvcellar-debug": "1"}
    response = client.post("/v1/chat/completions", json=chat_body(content, stream=stream), headers=headers)
    assert response.status_code == 200, response.text
    if not stream:
        value = response.json()
        return value["choices"][0]["message"]["content"], value["usage"], response.headers
    chunks = events_of(response.text)
    text = "".join(choice["delta"].get("content") or "" for chunk in chunks for choice in chunk["choices"])
    return text, chunks[-1]["usage"], response.headers


def check_conversation(client: httpx.Client, router: Router, fleet: Fleet) -> None:
    """Streamed and whole answers are the engine's own, and a prefix goes where it lies."""
    fleet.reset()
    random = Random(3)
    question = words(random, 200)
    first, usage, headers = chat(client, question, stream=True)
    direct = fleet.lives["a"][1].client.post("/v1/chat/completions", json=chat_body(question))
    assert direct.json()["choices"][0]["message"]["content"] == first
    fleet.reset()
    chat(client, words(random, 200), stream=False)
    home = None
    for _ in range(4):
        text, usage, headers = chat(client, question, stream=True)
        assert text == first
        home = home or headers["x-kvcellar-engine"]
        assert headers["x-kvcellar-engine"] == home
        decision = json.loads(headers["x-kvcellar-decision"])
        assert decision["prompt_tokens"] == usage["prompt_tokens"]
        assert decision["predicted_cached"] == (usage["prompt_tokens_details"] or {}).get("cached_tokens", 0)
    assert decision["predicted_cached"] >= 192


def check_other_apis(client: httpx.Client, router: Router, fleet: Fleet) -> None:
    """Anthropic's and OpenAI's newer API: the same tokens as a chat.

    As many of them are cached as was foreseen.
    """
    random = Random(5)
    for path in ("/v1/messages", "/v1/responses"):
        fleet.reset()
        mismatched = router.metric("kvcellar_route_prompts_mismatched_total")
        question, system = words(random, 150), words(random, 30)
        turns = [{"role": "user", "content": question}]
        body: dict[str, Any] = {"model": "model", "temperature": 0}
        if path == "/v1/messages":
            body |= {"system": system, "messages": turns, "max_tokens": 4}
        else:
            body |= {"instructions": system, "input": turns, "max_output_tokens": 4}
        for _ in range(3):
            response = client.post(path, json=body)
            assert response.status_code == 200, response.text
        ended = lambda: router.decisions()[-1]["reported_prompt"] is not None  # noqa: E731
        wait_until(ended, "the answer's end")
        last = router.decisions()[-1]
        assert (last["tokens_from"], last["prefix_from"]) == ("local", "precise")
        assert last["reported_cached"] == last["predicted_cached"] >= 128
        assert router.metric("kvcellar_route_prompts_mismatched_total") == mismatched


def check_refusals(client: httpx.Client, status_of_nothing: int) -> None:
    """What cannot be understood is refused by name; what needs no body is passed on."""
    post = client.post("/v1/chat/completions", content=b'{"messages": [', headers={"content-type": "application/json"})
    assert post.status_code == 400 and "not JSON" in post.json()["error"]["message"]
    post = client.post("/v1/chat/completions", json={"model": "model"})
    assert post.status_code == 400 and "`messages`" in post.json()["error"]["message"]
    post = client.post("/v1/completions", json={"model": "nobody's", "prompt": "x"})
    assert post.status_code == 404 and "nobody's" in post.json()["error"]["message"]
    models = client.get("/v1/models")
    assert models.status_code == 200 and models.json()["data"][0]["id"] == "model"
    # vLLM itself knows no such model.
    nick = client.post("/v1/completions", json={"model": "nick", "prompt": "x", "max_tokens": 1})
    assert (nick.status_code, nick.json()["model"]) == (200, "model"), nick.text
    assert client.post("/v1/chat/completions").status_code == status_of_nothing


def check_large(client: httpx.Client) -> None:
    """Four megabytes arrive whole: the engine itself says that it is too long. Nine are too many."""
    large = client.post("/v1/completions", json={"model": "model", "prompt": "word " * (4 * 200_000), "max_tokens": 1})
    assert large.status_code == 400 and "1024" in large.text, large.text[:300]
    larger = client.post("/v1/completions", json={"model": "model", "prompt": "x" * (9 << 20), "max_tokens": 1})
    assert larger.status_code == 413, larger.text[:300]


def check_abort(client: httpx.Client, router: Router, fleet: Fleet) -> None:
    """A client that goes away ends its request in the engine, and everything booked is given back."""
    before = router.metric("kvcellar_route_outcomes_total", outcome="aborted")
    body = chat_body(words(Random(9), 50), stream=True, max_tokens=900)
    with client.stream("POST", "/v1/chat/completions", json=body) as response:
        next(response.iter_raw())
    aborted = lambda: router.metric("kvcellar_route_outcomes_total", outcome="aborted") == before + 1  # noqa: E731
    wait_until(aborted, "the aborted request's end")
    assert router.metric("kvcellar_route_engine_in_flight") == 0
    assert router.metric("kvcellar_route_engine_in_flight_tokens") == 0
    for _, server in fleet.lives.values():
        wait_until(
            lambda server=server: server.metrics().value("vllm:num_requests_running") == 0, "the engine's end of it"
        )


@pytest.fixture(params=["proxy", "duplex", "buffered"])
def gate(request: pytest.FixtureRequest, router: Router, tmp_path: Path) -> Iterator[httpx.Client]:
    """The way in: our own proxy, or Envoy in one of both modes."""
    if request.param == "proxy":
        yield router.client
        return
    mode = "FULL_DUPLEX_STREAMED" if request.param == "duplex" else "BUFFERED"
    with open_envoy(tmp_path, router.picker_port, mode) as client:
        yield client


def test_requests_go_where_their_prefix_is(gate: httpx.Client, router: Router, fleet: Fleet) -> None:
    """The whole way, with every kind of request."""
    check_conversation(gate, router, fleet)
    check_other_apis(gate, router, fleet)
    check_refusals(gate, 400)
    check_large(gate)
    check_abort(gate, router, fleet)


def test_an_engine_and_the_picker_come_and_go(fleet: Fleet, tmp_path: Path) -> None:
    """One engine of two ends and comes back; then the picker does; then there is no engine."""
    flags = [*fleet.flags(), "--mode", "precise", "--tokenizer", str(real_model())]
    picker = free_port()
    with ExitStack() as ends:
        with open_router(tmp_path, *flags, name="first", picker_port=picker) as router:
            router.wait_engines(2)
            envoy = ends.enter_context(open_envoy(tmp_path, picker))
            for client in (router.client, envoy):
                chat(client, "hello", stream=False)
            fleet.stop("b")
            # Also in the time before the router has noticed: the proxy tries elsewhere.
            for _ in range(6):
                assert chat(router.client, "hello again", stream=False)[2]["x-kvcellar-engine"] == "a"
            router.wait_engines(1)
            assert chat(envoy, "hello again", stream=True)[2]["x-kvcellar-engine"] == "a"
            fleet.start("b")
            router.wait_engines(2)
            assert chat(envoy, "hello again", stream=True)[0]
        assert envoy.post("/v1/chat/completions", json=chat_body("nobody picks")).status_code >= 500
        with open_router(tmp_path, *flags, name="second", picker_port=picker) as router:
            router.wait_engines(2)
            wait_until(
                lambda: envoy.post("/v1/chat/completions", json=chat_body("x")).status_code == 200, "Envoy's way back"
            )
    nobody = ["--engine", f"http://127.0.0.1:{free_port()}"]
    with open_router(tmp_path, *nobody, name="third") as router, open_envoy(tmp_path, router.picker_port) as envoy:
        for client in (router.client, envoy):
            answer = client.post("/v1/chat/completions", json=chat_body("x"))
            assert answer.status_code == 503 and "no engine is available" in answer.text


def conversations(random: Random, count: int) -> list[list[dict[str, str]]]:
    """Conversations that share system prompts; their turns are played in mixed order."""
    systems = [words(random, 80) for _ in range(3)]
    return [[{"role": "system", "content": random.choice(systems)}] for _ in range(count)]


def play(router: Router, seed: int, *, count: int, turns: int) -> tuple[int, int]:
    """Plays conversations one request at a time. Returns how many were predicted exactly, and how many there were."""
    random = Random(seed)
    talks = conversations(random, count)
    queue = [talk for talk in talks for _ in range(turns)]
    random.shuffle(queue)
    equal = 0
    for talk in queue:
        talk.append({"role": "user", "content": words(random, random.randrange(20, 90))})
        body = {**chat_body("", max_tokens=8), "messages": talk}
        response = router.client.post("/v1/chat/completions", json=body, headers={"x-kvcellar-debug": "1"})
        assert response.status_code == 200, response.text
        value, decision = response.json(), json.loads(response.headers["x-kvcellar-decision"])
        cached = (value["usage"]["prompt_tokens_details"] or {}).get("cached_tokens", 0)
        equal += cached == decision["predicted_cached"]
        talk.append({"role": "assistant", "content": value["choices"][0]["message"]["content"]})
    return equal, len(queue)


@pytest.mark.parametrize(
    ("mode", "count", "turns"),
    [
        ("precise", 12, 4),
        pytest.param("precise", 40, 6, marks=pytest.mark.soak),
        pytest.param("approximate", 40, 6, marks=pytest.mark.soak),
    ],
)
def test_predictions_meet_the_engines_counts(fleet: Fleet, tmp_path: Path, mode: str, count: int, turns: int) -> None:
    """Cached tokens as predicted are those that the engine reports: nearly always when precise, reported when not."""
    fleet.reset()
    flags = [*fleet.flags(), "--mode", mode, "--tokenizer", str(real_model())]
    with open_router(tmp_path, *flags) as router:
        router.wait_engines(2)
        equal, requests = play(router, 21, count=count, turns=turns)
        reported = router.metric("kvcellar_route_reported_cached_tokens_total")
        predicted = router.metric("kvcellar_route_predicted_cached_tokens_total")
        print(f"{mode}: {equal} of {requests} predicted exactly; {predicted:.0f} tokens, reported {reported:.0f}")
        assert router.metric("kvcellar_route_prompts_mismatched_total") == 0
        if mode == "precise":
            assert equal >= 0.99 * requests


def test_real_events_say_who_holds_a_prompt_in_host_memory(fleet: Fleet, tmp_path: Path) -> None:
    """The other engine is told of it, and computes the prompt all the same where it cannot fetch."""
    fleet.reset()
    flags = [*fleet.flags(), "--mode", "precise", "--policy", "round-robin", "--source-hints", "engine"]
    random = Random(5)
    with open_router(tmp_path, *flags, "--source-tokens", str(8 * BLOCK_TOKENS)) as router:
        router.wait_engines(2)

        def is_told() -> bool:
            """A prompt that `a` holds goes to `b`. Events may still be on their way; then the next prompt is tried."""
            prompt = [random.randrange(100, 40_000) for _ in range(10 * BLOCK_TOKENS)]
            body = {"model": "model", "prompt": prompt, "max_tokens": 4, "temperature": 0, "ignore_eos": True}
            first = fleet.lives["a"][1].client.post("/v1/completions", json=body).json()
            while not (decisions := router.decisions()) or decisions[-1]["engine"] != "a":
                router.client.post("/v1/completions", json={**body, "prompt": [1, 2, 3]}).raise_for_status()
            second = router.client.post("/v1/completions", json=body).json()
            decision = router.decisions()[-1]
            assert (decision["engine"], second["choices"][0]["text"]) == ("b", first["choices"][0]["text"])
            assert decision["source"] in (None, "a")
            return decision["source"] == "a"

        wait_until(is_told, "a hint")
