"""What gateways expect of an endpoint picker, each a row: what engines say, what is asked, and what comes of it.

Through a real Envoy in both ways in which it sends bodies, in front of fake engines.
"""

import contextlib
import itertools
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.vllm.fake import Fake
from tests.vllm.fake_faults import HEADER, Fault
from tests.vllm.gateway import (
    DECISION,
    DESTINATION,
    ENDPOINT,
    HEALTH_NAMES,
    SERVED,
    SUBSET_LIST,
    SUBSET_TEXT,
    UNKNOWN_HEALTH_NAME,
    Gateway,
    listed,
    open_gateway,
)
from tests.vllm.processes import wait_until
from tests.vllm.router import Router, open_router
from tests.vllm.server import free_port
from tests.vllm.soak_fleet import Fleet, open_fleet

MODES = {"duplex": "FULL_DUPLEX_STREAMED", "buffered": "BUFFERED"}
# Equals are shuffled: no engine is the right one so often by chance.
ASKED = 4
SCORERS = ["--policy", "scorers", "--scorers", "prefix=3,queue=2,kv-usage=2,lora=2"]
ROUTERS: dict[str, list[str]] = {
    "field": SCORERS,
    "falls back": [*SCORERS, "--ext-proc-fallbacks", "1"],
    "one at a time": [*SCORERS, "--in-flight", "1"],
    "by name": SCORERS,
    "nobody": SCORERS,
}
DEBUG = (("x-kvcellar-debug", "1"),)
PROMPT = {"prompt": [1, 2, 3], "max_tokens": 2}
CHAT = {"messages": [{"role": "user", "content": "What is a block"}], "max_tokens": 2}
LONG = {"prompt": list(range(1, 1025)), "max_tokens": 2}
STREAM = {"prompt": [1, 2, 3], "max_tokens": 8, "stream": True, "stream_options": {"include_usage": True}}
LARGE = {**PROMPT, "user": "x" * (3 << 20)}
markers = itertools.count(1000)


@dataclass
class Scene:
    """A router, a gateway in front of it, and the engines behind."""

    fleet: Fleet
    router: Router
    gateway: Gateway

    def address(self, name: str) -> str:
        """Of an engine, or of nobody."""
        return f"127.0.0.1:{self.fleet.engines[name].port}" if name in self.fleet.engines else "127.0.0.1:1"

    def say(self, says: dict[str, dict[str, Any]]) -> None:
        """Lets engines say this of themselves, and waits until the router has heard it."""
        marker = next(markers)
        for name, engine in self.fleet.engines.items():
            engine.tell("/say", **{"waiting": 0, "kv_usage": 0.5, "running": marker, **says.get(name, {})})
        rows = lambda: self.router.admin.get("/debug/engines").json()  # noqa: E731
        heard = lambda: {row["running"] for row in rows() if row["health"] == "healthy"} <= {marker}  # noqa: E731
        wait_until(heard, "what the engines say")


@dataclass(frozen=True)
class Ask:
    """A request.

    Attributes:
        body: as JSON, unless it is bytes.
        pieces: the body comes in chunks of so many bytes; 0: whole, with its length.
        subset: engines that alone may take it: as one text with commas, or as a list.

    """

    body: Any = None
    path: str = "/v1/completions"
    method: str = "POST"
    headers: tuple[tuple[str, str], ...] = ()
    pieces: int = 0
    subset: str | list[str] | None = None

    def content(self) -> bytes:
        """Its body."""
        if self.body is None:
            return b""
        return self.body if isinstance(self.body, bytes) else json.dumps(self.body).encode()

    def send(self, scene: Scene) -> httpx.Response:
        """Sends it."""
        whole = self.content()
        pieces = (whole[at : at + self.pieces] for at in range(0, len(whole), self.pieces or 1))
        headers = [("content-type", "application/json"), *self.headers]
        # A client may not say where it goes.
        headers = [(name, value.replace("{b}", scene.address("b"))) for name, value in headers]
        if isinstance(self.subset, str):
            headers.append((SUBSET_TEXT, ", ".join(scene.address(name) for name in self.subset.split(","))))
        elif self.subset is not None:
            headers.append((SUBSET_LIST, listed([scene.address(name) for name in self.subset])))
        content = pieces if self.pieces else whole or None
        return scene.gateway.client.request(self.method, self.path, headers=headers, content=content)


def wait_idle(scene: Scene) -> None:
    """Until the router has seen the end of every request: clients have theirs a moment earlier."""
    wait_until(lambda: scene.router.metric("kvcellar_route_engine_in_flight") == 0, "the end of all requests")


def once(scene: Scene, ask: Ask) -> httpx.Response:
    """Sends a request."""
    return ask.send(scene)


def always(scene: Scene, ask: Ask) -> httpx.Response:
    """Sends it several times: it is answered by the same engine every time."""
    answers = []
    for _ in range(ASKED):
        answers.append(ask.send(scene))
        wait_idle(scene)
    engines = {answer.headers.get("x-fake-engine") for answer in answers}
    assert len(engines) == 1, engines
    return answers[-1]


def beside_another(scene: Scene, ask: Ask) -> httpx.Response:
    """While another request is being answered; before and after it there is room."""
    slow = [("content-type", "application/json"), (HEADER, f"{Fault.SILENT_MID}@*")]
    with scene.gateway.client.stream("POST", ask.path, headers=slow, content=json.dumps(STREAM)) as other:
        assert other.status_code == 200, other.read()
        parts = other.iter_raw()
        next(parts)
        answer = ask.send(scene)
    wait_idle(scene)
    assert ask.send(scene).status_code == 200
    return answer


def in_parts(scene: Scene, ask: Ask) -> httpx.Response:
    """The first part of the answer is there while the engine is still at work on the rest."""
    headers = [("content-type", "application/json"), (HEADER, f"{Fault.SLOW}@*")]
    with scene.gateway.client.stream(ask.method, ask.path, headers=headers, content=ask.content()) as answer:
        parts = answer.iter_raw()
        first = next(parts)
        assert not scene.fleet.engines[answer.headers["x-fake-engine"]].is_idle()
        text = (first + b"".join(parts)).decode()
    assert text.startswith("data: ") and text.endswith("data: [DONE]\n\n"), text
    assert text.count("data: ") == ask.body["max_tokens"] + 2, text
    wait_idle(scene)
    assert scene.router.decisions()[-1]["reported_prompt"] == len(ask.body["prompt"])
    return answer


def after_the_same(scene: Scene, ask: Ask) -> httpx.Response:
    """Engine b has had the prompt already."""
    assert Ask(ask.body, subset="b").send(scene).headers["x-fake-engine"] == "b"
    return ask.send(scene)


def where_the_first_fails(scene: Scene, ask: Ask) -> httpx.Response:
    """Engine a is wanted, and answers 503 to everything."""
    scene.fleet.engines["a"].tell("/mode", fault=Fault.UNAVAILABLE)
    try:
        return ask.send(scene)
    finally:
        scene.fleet.engines["a"].tell("/mode")


@dataclass(frozen=True)
class Row:
    """One behaviour.

    Attributes:
        says: what each engine says of itself.
        engine: who answers; `None`: any.
        text: a part of the answer.
        sees: further checks of the answer.

    """

    ask: Ask
    says: dict[str, dict[str, Any]] = field(default_factory=dict)
    router: str = "field"
    sent: Callable[[Scene, Ask], httpx.Response] = once
    status: int = 200
    engine: str | None = None
    text: str = ""
    sees: Callable[[Scene, Ask, httpx.Response], None] = lambda _scene, _ask, _answer: None


def body_arrived(scene: Scene, ask: Ask, answer: httpx.Response) -> None:
    """The engine has the body byte by byte."""
    state = scene.fleet.engines[answer.headers["x-fake-engine"]].operator.get("/state").json()
    assert state["last_body"].encode() == ask.content()


def decision_told(_scene: Scene, ask: Ask, answer: httpx.Response) -> None:
    """The metadata says what the decision was made from."""
    told = json.loads(answer.headers[DECISION])
    assert told["engine"] == answer.headers["x-fake-engine"]
    assert told["prompt_tokens"] >= len(ask.body["prompt"]) // 2
    best, other = told["considered"]
    assert (best["engine"], {best["engine"], other["engine"]}) == (told["engine"], {"a", "b"})
    assert best["total"] > other["total"]
    assert told["predicted_cached"] == best["held_tokens"]


def prefix_told(scene: Scene, ask: Ask, answer: httpx.Response) -> None:
    """The metadata says how much of the prompt was expected to be there."""
    decision_told(scene, ask, answer)
    told = json.loads(answer.headers[DECISION])
    assert told["predicted_cached"] > 0 and told["considered"][1]["held_tokens"] == 0


def fell_back(scene: Scene, _ask: Ask, answer: httpx.Response) -> None:
    """The gateway was told both, in their order, and the router where it went."""
    assert answer.headers[ENDPOINT] == f"{scene.address('a')},{scene.address('b')}"
    wait_idle(scene)
    last = scene.router.decisions()[-1]
    assert (last["engine"], last["why"], last["outcome"]) == ("b", "fallback", "done")


def told_to_come_again(_scene: Scene, _ask: Ask, answer: httpx.Response) -> None:
    """The client is told why, and that it may come again."""
    assert answer.headers["x-kvcellar-dropped-reason"] == "shed"
    assert int(answer.headers["retry-after"]) >= 1


def adapters(most: int, running: str = "", waiting: str = "") -> dict[str, Any]:
    """What an engine says of its adapters."""
    return {"adapters_max": most, "adapters_running": running.split(), "adapters_waiting": waiting.split()}


BUSY, FULL = {"waiting": 5}, {"kv_usage": 0.9}
TABLE: dict[str, Row] = {
    # Load.
    "shorter queue": Row(Ask(PROMPT, headers=DEBUG), {"a": BUSY}, sent=always, engine="b", sees=decision_told),
    "shorter queue, the other": Row(Ask(PROMPT), {"b": BUSY}, sent=always, engine="a"),
    "lower KV usage": Row(Ask(PROMPT, headers=DEBUG), {"a": FULL}, sent=always, engine="b", sees=decision_told),
    "lower KV usage, the other": Row(Ask(CHAT, "/v1/chat/completions"), {"b": FULL}, sent=always, engine="a"),
    "queue outweighs KV usage": Row(Ask(PROMPT), {"a": {"waiting": 1}, "b": FULL}, sent=always, engine="b"),
    # Prefixes and adapters.
    "prefix": Row(Ask(LONG, headers=DEBUG), sent=after_the_same, engine="b", sees=prefix_told),
    "adapter loaded": Row(
        Ask({**PROMPT, "model": "x"}), {"a": adapters(2, "x"), "b": adapters(2)}, sent=always, engine="a"
    ),
    "new adapter, where there is room": Row(
        Ask({**PROMPT, "model": "x"}), {"a": adapters(2, "y z"), "b": adapters(2, "y")}, sent=always, engine="b"
    ),
    "adapter that waits, before a full engine": Row(
        Ask({**PROMPT, "model": "x"}), {"a": adapters(2, "y", "x"), "b": adapters(2, "y z")}, sent=always, engine="a"
    ),
    "base model, whatever is loaded": Row(
        Ask({**PROMPT, "model": "model"}),
        {"a": {**BUSY, **adapters(2)}, "b": adapters(2, "x y")},
        sent=always,
        engine="b",
    ),
    # Refusals.
    "no engine": Row(Ask(PROMPT), router="nobody", status=503, text="no engine is available"),
    "no engine, without a body": Row(Ask(path="/v1/models", method="GET"), router="nobody", status=503),
    "unknown model": Row(Ask({**PROMPT, "model": "nobodys"}), status=404, text="nobodys"),
    "bad JSON": Row(Ask(b'{"prompt": ['), status=400, text="not JSON"),
    "bad JSON in pieces": Row(Ask(b'{"prompt": [', pieces=3), status=400, text="not JSON"),
    "no object": Row(Ask(b"[1]"), status=400, text="not a JSON object"),
    "no prompt": Row(Ask({"model": "model"}), status=400, text="`prompt`"),
    "shed": Row(
        Ask(PROMPT), router="one at a time", sent=beside_another, status=429, text="in flight", sees=told_to_come_again
    ),
    # Bodies.
    "body in many chunks": Row(Ask({**PROMPT, "user": "x" * 100_000}, pieces=1000), sees=body_arrived),
    "large body": Row(Ask(LARGE), sees=body_arrived),
    "large body in chunks": Row(Ask(LARGE, pieces=70_000), sees=body_arrived),
    "header only": Row(Ask(path="/v1/models", method="GET"), text='"data"'),
    "post without a body": Row(Ask(path="/v1/embeddings"), text='"data"'),
    "prompt without a body": Row(Ask(), status=400, text="no body"),
    "answer in parts": Row(Ask(STREAM), sent=in_parts),
    # Subsets that the gateway allows.
    "subset of one": Row(Ask(PROMPT, subset="a"), {"a": BUSY}, sent=always, engine="a"),
    "subset of one, without a body": Row(
        Ask(path="/v1/models", method="GET", subset="a"), {"a": BUSY}, sent=always, engine="a"
    ),
    "subset as a list": Row(Ask(PROMPT, subset=["a"]), {"a": BUSY}, sent=always, engine="a"),
    "best of a subset": Row(Ask(PROMPT, subset="a,b"), {"a": BUSY}, sent=always, engine="b"),
    "subset with an unknown one": Row(Ask(PROMPT, subset=["nobody", "a"]), {"a": BUSY}, sent=always, engine="a"),
    "subset that no engine is in": Row(Ask(PROMPT, subset="nobody"), status=503, text="subset"),
    "subset of none": Row(Ask(PROMPT, subset=[]), status=503, text="subset"),
    "subset by address, engines by name": Row(
        Ask(PROMPT, subset="a"), {"a": BUSY}, router="by name", sent=always, engine="a"
    ),
    # Addresses.
    "client names an engine": Row(Ask(PROMPT, headers=((DESTINATION, "{b}"),)), {"b": BUSY}, sent=always, engine="a"),
    "client names engines twice": Row(
        Ask(PROMPT, headers=((DESTINATION, "{b},{b}"), (DESTINATION, "{b}"))), {"b": BUSY}, sent=always, engine="a"
    ),
    "first engine fails": Row(
        Ask(PROMPT), {"b": BUSY}, router="falls back", sent=where_the_first_fails, engine="b", sees=fell_back
    ),
    "first engine is well": Row(Ask(PROMPT), {"b": BUSY}, router="falls back", sent=always, engine="a"),
}
# Rows of one router follow each other: it is started once.
IN_ORDER = sorted(itertools.product(TABLE, MODES), key=lambda it: (list(ROUTERS).index(TABLE[it[0]].router), it[1]))


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    """Two engines that serve a model and three adapters."""
    work_dir = tmp_path_factory.mktemp("table")
    with open_fleet(work_dir, {name: Fake(name, work_dir, adapters="x y z") for name in "ab"}) as made:
        yield made


class Scenes:
    """One scene at a time, kept as long as it is the one that is wanted."""

    def __init__(self, fleet: Fleet, work_dir: Path) -> None:
        """Opens none."""
        self.fleet, self.work_dir = fleet, work_dir
        self.now: tuple[str, str] | None = None
        self.ends = contextlib.ExitStack()
        self.scene: Scene | None = None

    def flags(self, name: str) -> list[str]:
        """Where this router's engines are."""
        if name == "nobody":
            return ["--engine", f"http://127.0.0.1:{free_port()}"]
        if name == "by name":
            specs = [f"name={it.name},url=http://localhost:{it.port}" for it in self.fleet.engines.values()]
            return [flag for spec in specs for flag in ("--engine", spec)]
        return ["--engines-file", str(self.fleet.file)]

    def of(self, name: str, mode: str) -> Scene:
        """A router and a gateway that run."""
        if self.scene is None or self.now != (name, mode):
            self.ends.close()
            self.ends = contextlib.ExitStack()
            router = self.ends.enter_context(open_router(self.work_dir, *self.flags(name), *ROUTERS[name]))
            router.wait_engines(0 if name == "nobody" else len(self.fleet.engines))
            ports = [engine.port for engine in self.fleet.engines.values()]
            opened = open_gateway(self.work_dir, router.picker_port, MODES[mode], ports)
            self.scene = Scene(self.fleet, router, self.ends.enter_context(opened))
            self.now = (name, mode)
        return self.scene


@pytest.fixture(scope="module")
def scenes(fleet: Fleet, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scenes]:
    """Those of this table."""
    made = Scenes(fleet, tmp_path_factory.mktemp("scenes"))
    try:
        yield made
    finally:
        made.ends.close()


def check_address(scene: Scene, ask: Ask, answer: httpx.Response) -> None:
    """The engine that answers is the one named first in the metadata, and the header says the same, once."""
    name = answer.headers["x-fake-engine"]
    assert answer.headers[SERVED] == scene.address(name)
    if ask.path == "/v1/completions":
        state = scene.fleet.engines[name].operator.get("/state").json()
        assert state["last_headers"][DESTINATION] == [answer.headers[ENDPOINT]]
    told = json.loads(answer.headers[DECISION])
    assert told["engine"] in scene.fleet.engines
    # The rest costs time.
    assert ("considered" in told) == (ask.headers == DEBUG)


@pytest.mark.parametrize(("name", "mode"), IN_ORDER, ids=[f"{name}-{mode}" for name, mode in IN_ORDER])
def test_the_picker_does_what_gateways_expect(scenes: Scenes, name: str, mode: str) -> None:
    row = TABLE[name]
    scene = scenes.of(row.router, mode)
    scene.say(row.says)
    answer = row.sent(scene, row.ask)
    assert answer.status_code == row.status, answer.text
    if row.status == 200:
        check_address(scene, row.ask, answer)
        if row.sent is not where_the_first_fails:
            assert answer.headers[ENDPOINT].split(",")[0] == answer.headers[SERVED]
    if row.engine is not None:
        assert answer.headers["x-fake-engine"] == row.engine
    if row.text:
        assert row.text in answer.text
    row.sees(scene, row.ask, answer)


@pytest.mark.parametrize("router", ["field", "nobody"])
def test_the_pickers_health_is_that_of_its_engines(scenes: Scenes, router: str) -> None:
    ready = "serving" if router == "field" else "failed_active_health_check"
    wanted = dict.fromkeys(HEALTH_NAMES, ready) | {"liveness": "serving"}
    wanted[UNKNOWN_HEALTH_NAME] = "failed_active_health_check"
    scene = scenes.of(router, "duplex")
    wait_until(lambda: scene.gateway.health() == wanted, f"these health checks: {wanted}")
