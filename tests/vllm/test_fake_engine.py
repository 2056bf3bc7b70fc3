"""What a router relies on in a vLLM server, asked of the real one and of the fake one."""

import json
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from random import Random
from typing import Any

import httpx
import msgspec
import pytest
import zmq

from tests.deadlines import deadline
from tests.vllm.fake import open_fake
from tests.vllm.metrics import Snapshot
from tests.vllm.places import temporary_pool_dir
from tests.vllm.processes import wait_until
from tests.vllm.server import BLOCK_TOKENS, KV_BLOCKS, free_port, open_server
from tests.vllm.sizes import kv_mib
from tests.vllm.subscriber import Event, Subscriber

NAMES = ["num_requests_running", "num_requests_waiting", "kv_cache_usage_perc", "cache_config_info"]
COUNTERS = ["prefix_cache_queries", "prefix_cache_hits"]


@dataclass
class Subject:
    """A server and somebody who listens to it from its first batch on."""

    client: httpx.Client
    replay: str
    heard: Subscriber
    random: Random

    def prompt(self, tokens: int) -> list[int]:
        """Ids that every vocabulary has, and that no other prompt begins with."""
        return [self.random.randrange(100, 40_000) for _ in range(tokens)]

    def complete(self, prompt: list[int], **more: Any) -> dict[str, Any]:
        """A whole answer."""
        body = {"model": "model", "prompt": prompt, "max_tokens": 4, "temperature": 0, "ignore_eos": True, **more}
        response = self.client.post("/v1/completions", json=body)
        assert response.status_code == 200, response.text
        value: dict[str, Any] = response.json()
        return value

    def metrics(self) -> Snapshot:
        return Snapshot.of_text(self.client.get("/metrics").text)

    def stored(self, prompt: list[int]) -> list[Event]:
        """The events that tell of a prompt's blocks in the engine's own cache."""
        first = prompt[:BLOCK_TOKENS]
        chain: list[Event] = []
        for event in self.heard.of("BlockStored", "GPU"):
            begins = event["token_ids"][:BLOCK_TOKENS] == first and event["parent_block_hash"] is None
            if begins or (chain and event["parent_block_hash"] == chain[-1]["block_hashes"][-1]):
                chain.append(event)
        return chain


@pytest.fixture(scope="module", params=["fake", "real"])
def subject(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, seed: int) -> Iterator[Subject]:
    """Each server with as many blocks as the other."""
    work_dir = tmp_path_factory.mktemp(request.param)
    with ExitStack() as ends:
        if request.param == "fake":
            fake = ends.enter_context(open_fake(work_dir, KV_BLOCKS - 1, BLOCK_TOKENS))
            client, events, replay = fake.client, fake.events_port, fake.replay_port
        else:
            request.getfixturevalue("vllm_installed")
            pool_dir = ends.enter_context(temporary_pool_dir())
            cellar = {"dram_size": kv_mib(64), "namespace_salt": "conformance"}
            events = free_port(2)
            # Without it vLLM 0.32 renders nothing.
            more = ["--enable-scale-out"]
            server = ends.enter_context(open_server(work_dir, pool_dir, cellar=cellar, events_port=events, more=more))
            client, replay = server.client, events + 1
        heard = ends.enter_context(Subscriber(f"tcp://127.0.0.1:{events}"))
        yield Subject(client, f"tcp://127.0.0.1:{replay}", heard, Random(f"conformance-{seed}"))


def test_it_says_what_it_serves(subject: Subject) -> None:
    assert subject.client.get("/health").status_code == 200
    models = subject.client.get("/v1/models").json()
    assert models["object"] == "list"
    assert [(row["id"], row["object"], row["parent"]) for row in models["data"]] == [("model", "model", None)]
    assert models["data"][0]["max_model_len"] > 0


def test_it_says_how_it_is(subject: Subject) -> None:
    """Under the names that a router reads."""
    metrics = subject.metrics()
    assert {f"vllm:{name}" for name in NAMES + COUNTERS} <= metrics.families
    assert int(*metrics.labels("vllm:cache_config_info", "block_size")) == BLOCK_TOKENS
    assert int(*metrics.labels("vllm:cache_config_info", "num_gpu_blocks")) > 0
    assert metrics.value("process_start_time_seconds") > 1e9


def test_a_whole_answer_counts_its_cached_tokens(subject: Subject) -> None:
    prompt = subject.prompt(10 * BLOCK_TOKENS)
    before = subject.metrics()
    first, second = subject.complete(prompt), subject.complete(prompt)
    after = subject.metrics()
    for answer, cached in ((first, 0), (second, 9 * BLOCK_TOKENS)):
        assert answer["object"] == "text_completion" and answer["model"] == "model"
        assert answer["choices"][0]["finish_reason"] == "length" and answer["choices"][0]["text"]
        usage = answer["usage"]
        assert (usage["prompt_tokens"], usage["completion_tokens"]) == (len(prompt), 4)
        assert usage["total_tokens"] == len(prompt) + 4
        assert (usage["prompt_tokens_details"] or {}).get("cached_tokens", 0) == cached
    assert first["choices"][0]["text"] == second["choices"][0]["text"]
    for name, tokens in (("queries", 2 * len(prompt)), ("hits", 9 * BLOCK_TOKENS)):
        total = f"vllm:prefix_cache_{name}_total"
        assert after.value(total) - before.value(total) == tokens


@pytest.mark.parametrize("chat", [False, True])
def test_a_stream_has_its_shape(subject: Subject, chat: bool) -> None:
    asked: dict[str, Any] = {"messages": [{"role": "user", "content": "some words"}]} if chat else {"prompt": [5, 6, 7]}
    body = {"model": "model", "max_tokens": 5, "temperature": 0, "ignore_eos": True, "stream": True, **asked}
    path = "/v1/chat/completions" if chat else "/v1/completions"
    response = subject.client.post(path, json={**body, "stream_options": {"include_usage": True}})
    assert response.status_code == 200
    assert response.headers["content-type"].startswith("text/event-stream")
    *lines, end, rest = response.text.split("\n\n")
    assert (end, rest) == ("data: [DONE]", "")
    chunks = [json.loads(line.removeprefix("data: ")) for line in lines]
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk" if chat else "text_completion"}
    assert len({chunk["id"] for chunk in chunks}) == 1
    assert chunks[-1]["choices"] == [] and chunks[-1]["usage"]["completion_tokens"] == 5
    choices = [chunk["choices"][0] for chunk in chunks[:-1]]
    if chat:
        assert choices[0]["delta"]["role"] == "assistant"
        assert "".join(choice["delta"].get("content") or "" for choice in choices)
    else:
        assert "".join(choice["text"] for choice in choices)
    assert [choice["finish_reason"] for choice in choices if choice["finish_reason"]] == ["length"]
    unasked = subject.client.post(path, json=body).text
    assert '"usage":{' not in unasked and unasked.endswith("data: [DONE]\n\n")


def test_it_refuses_what_it_cannot_take(subject: Subject) -> None:
    length = subject.client.get("/v1/models").json()["data"][0]["max_model_len"]
    for body in (b'{"prompt": [1', json.dumps({"model": "model", "prompt": [5] * (length + 1)}).encode()):
        headers = {"content-type": "application/json"}
        response = subject.client.post("/v1/completions", content=body, headers=headers)
        assert response.status_code == 400
        assert {"message", "type", "code"} <= response.json()["error"].keys()


def test_it_renders_prompts(subject: Subject) -> None:
    """The ids that a request becomes, without computing anything: by both endpoints that say so."""
    messages = {"model": "model", "messages": [{"role": "user", "content": "some more words"}]}
    rendered = subject.client.post("/v1/chat/completions/render", json=messages)
    assert rendered.status_code == 200, rendered.text
    ids = rendered.json()["token_ids"]
    assert subject.client.post("/tokenize", json=messages).json()["tokens"] == ids
    whole = subject.client.post("/v1/chat/completions", json={**messages, "max_tokens": 1}).json()
    assert whole["usage"]["prompt_tokens"] == len(ids) and all(isinstance(token, int) for token in ids)


@pytest.mark.parametrize("path", ["/v1/messages", "/v1/responses"])
def test_other_apis_are_chats(subject: Subject, path: str) -> None:
    """Of the same tokens, which each counts in its own way."""
    long = " ".join(f"{word} words" for word in subject.prompt(2 * BLOCK_TOKENS))
    turns = [{"role": "user", "content": long}]
    system = "Be brief."
    chat = {"model": "model", "messages": [{"role": "system", "content": system}, *turns]}
    ids = subject.client.post("/v1/chat/completions/render", json=chat).json()["token_ids"]
    body: dict[str, Any] = {"model": "model", "temperature": 0}
    if path == "/v1/messages":
        body |= {"system": system, "messages": turns, "max_tokens": 4}
    else:
        body |= {"instructions": system, "input": turns, "max_output_tokens": 4}
    first, second = (subject.client.post(path, json=body) for _ in range(2))
    assert first.status_code == second.status_code == 200, second.text
    usage = second.json()["usage"]
    cached = (len(ids) - 1) // BLOCK_TOKENS * BLOCK_TOKENS
    if path == "/v1/messages":
        assert (usage["input_tokens"], usage["cache_read_input_tokens"]) == (len(ids) - cached, cached)
    else:
        assert (usage["input_tokens"], usage["input_tokens_details"]["cached_tokens"]) == (len(ids), cached)


def test_its_events_tell_of_blocks(subject: Subject) -> None:
    """Stored in chains, removed by age, numbered, and replayed as they were sent."""
    prompt = subject.prompt(6 * BLOCK_TOKENS + 3)
    subject.complete(prompt)
    covered = 6 * BLOCK_TOKENS
    wait_until(lambda: sum(len(it["token_ids"]) for it in subject.stored(prompt)) >= covered, "the prompt's blocks")
    chain = subject.stored(prompt)
    told = [token for event in chain for token in event["token_ids"]]
    assert told[:covered] == prompt[:covered]
    names = [name for event in chain for name in event["block_hashes"]]
    assert len(set(names)) == len(names) and all(isinstance(name, int) for name in names)
    for event in chain:
        assert event["block_size"] == BLOCK_TOKENS
        assert len(event["token_ids"]) == BLOCK_TOKENS * len(event["block_hashes"])
        assert event.get("lora_id") is None and event.get("lora_name") is None
        assert event.get("group_idx") == 0 and event.get("kv_cache_spec_kind") == "full_attention"
    for _ in range(8):
        subject.complete(subject.prompt(12 * BLOCK_TOKENS))

    def removed() -> set[int]:
        return {name for event in subject.heard.of("BlockRemoved", "GPU") for name in event["block_hashes"]}

    wait_until(lambda: set(names) <= removed(), "their eviction")
    assert subject.heard.sequences == list(range(subject.heard.sequences[0], subject.heard.sequences[-1] + 1))
    replayed = replay(subject.replay)
    assert [number for number, _ in replayed] == list(range(len(replayed)))
    stored = [name for _, batch in replayed for event in batch[1] for name in event.get("block_hashes", [])]
    assert set(names) <= set(stored)
    assert {batch[2] for _, batch in replayed} <= {0, None}


def replay(endpoint: str) -> list[tuple[int, Any]]:
    """All batches that a publisher has kept."""
    found: list[tuple[int, Any]] = []
    with zmq.Context() as context, context.socket(zmq.DEALER) as socket:
        socket.set(zmq.LINGER, 0)
        socket.connect(endpoint)
        socket.send_multipart((b"", (0).to_bytes(8, "big")))
        while True:
            assert socket.poll(deadline(20.0) * 1000), "the replay did not end"
            _, _, number, payload = socket.recv_multipart()
            if number == b"\xff" * 8:
                return found
            found.append((int.from_bytes(number, "big"), msgspec.msgpack.decode(payload)))


def test_a_client_that_goes_away_ends_its_request(subject: Subject) -> None:
    body = {"model": "model", "prompt": [5, 6, 7], "max_tokens": 900, "ignore_eos": True, "stream": True}
    with subject.client.stream("POST", "/v1/completions", json=body) as response:
        next(response.iter_raw())
    wait_until(lambda: subject.metrics().value("vllm:num_requests_running") == 0, "the end of the request")
