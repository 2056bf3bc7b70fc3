"""The index beside the real vLLM: its publisher, its block pool, and our engine's tiers."""

import json
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from random import Random
from typing import Any

import msgspec
import pytest
import zmq

from tests.deadlines import deadline, shrunk
from tests.python.index_server import IndexServer, index_server
from tests.vllm.engines import Engine, open_engine
from tests.vllm.places import temporary_disk_dir, temporary_pool_dir
from tests.vllm.processes import wait_until
from tests.vllm.prompts import prompt
from tests.vllm.server import BLOCK_TOKENS, KV_BLOCKS, free_port
from tests.vllm.sizes import kv_mib
from tests.vllm.test_events import block_hash

ANSWER_TOKENS = 4
TIERS = {"dram": "cpu", "nvme": "storage_local"}


def batch(first: int, count: int, medium: str = "GPU") -> Any:
    """vLLM's own batch: blocks of two tokens, named by their numbers, in one chain from 1 on."""
    from vllm.distributed.kv_events import BlockStored, KVEventBatch

    stored = BlockStored(
        block_hashes=list(range(first, first + count)),
        parent_block_hash=first - 1 if first > 1 else None,
        token_ids=list(range(2 * first, 2 * (first + count))),
        block_size=2,
        lora_id=None,
        medium=medium,
        lora_name=None,
    )
    return KVEventBatch(ts=time.time(), events=[stored])


def score(server: IndexServer, blocks: int) -> dict[str, int]:
    """Usable blocks of the chain from 1 on, by engine."""
    answer = server.post("/v1/score", {"prompt": {"tokens": list(range(2, 2 * (blocks + 1)))}})
    return {row["engine"]: row["blocks"] for row in answer["engines"]}


class Publisher:
    """vLLM's own publisher on fixed ports."""

    def __init__(self, port: int, buffer_steps: int = 100) -> None:
        """Binds as vLLM does."""
        from vllm.distributed.kv_events import ZmqEventPublisher

        self.inner = ZmqEventPublisher(
            0, endpoint=f"tcp://*:{port}", replay_endpoint=f"tcp://*:{port + 1}", buffer_steps=buffer_steps
        )

    def close(self) -> None:
        """Ends it: its ports are free afterwards."""
        self.inner.shutdown()


def test_vllms_publisher_its_replays_and_its_restarts(vllm_installed: None) -> None:
    """What was published before the index came, while it listens, and by another life on the same ports."""
    port = free_port(2)
    first = Publisher(port)
    for number in range(1, 21):
        first.inner.publish(batch(number, 1))
    time.sleep(0.5)
    source = f"name=a,endpoint=tcp://127.0.0.1:{port},replay=tcp://127.0.0.1:{port + 1}"
    with index_server("--engine", source) as server:
        wait_until(lambda: score(server, 40) == {"a": 20}, "blocks from before the subscription")
        for number in range(21, 31):
            first.inner.publish(batch(number, 1))
        wait_until(lambda: score(server, 40) == {"a": 30}, "live blocks")
        assert server.request("GET", "/healthz")[0] == 200
        first.close()
        wait_until(lambda: server.request("GET", "/healthz")[0] == 503, "the loss of the line")
        assert score(server, 40) == {"a": 30}, "a line that breaks is no reason to forget"
        second = Publisher(port)
        second.inner.publish(batch(1, 5))
        wait_until(lambda: score(server, 40) == {"a": 5}, "the new life's blocks")
        stream = server.get("/v1/engines")["sources"]["a"]["streams"][0]
        assert (stream["restarts"], stream["gaps"], stream["live"]) == (1, 0, True)
        second.close()


def test_a_new_replica_takes_over_what_no_replay_has_any_more(vllm_installed: None) -> None:
    """Then both follow the engine, each for itself."""
    port = free_port(2)
    publisher = Publisher(port, buffer_steps=20)
    source = f"name=a,endpoint=tcp://127.0.0.1:{port},replay=tcp://127.0.0.1:{port + 1}"
    with index_server("--engine", source) as first:
        publisher.inner.publish(batch(1, 1))
        wait_until(lambda: score(first, 80) == {"a": 1}, "the first block")
        for number in range(2, 41):
            publisher.inner.publish(batch(number, 1))
        wait_until(lambda: score(first, 80) == {"a": 40}, "all blocks")
        with index_server("--engine", source, "--catch-up", f"http://127.0.0.1:{first.port}") as second:
            assert score(second, 80) == {"a": 40}, second.log
            wait_until(lambda: second.request("GET", "/healthz")[0] == 200, "the replica's own subscription")
            for number in range(41, 51):
                publisher.inner.publish(batch(number, 1))
            for server in (first, second):
                wait_until(lambda server=server: score(server, 80) == {"a": 50}, "later blocks")
            stream = second.get("/v1/engines")["sources"]["a"]["streams"][0]
            assert (stream["gaps"], stream["restarts"]) == (0, 0)
        with index_server("--engine", source) as late:
            wait_until(lambda: late.request("GET", "/healthz")[0] == 200, "the replay's end")
            assert score(late, 80) == {}, "the beginning is in no replay"
    publisher.close()


def test_without_replays_a_hole_clears_the_engine(vllm_installed: None) -> None:
    """A subscriber that has lost a batch says so and starts over."""
    with zmq.Context() as context, context.socket(zmq.PUB) as socket:
        socket.set(zmq.LINGER, 0)
        port = socket.bind_to_random_port("tcp://127.0.0.1")

        def publish(number: int, value: Any) -> None:
            socket.send_multipart((b"kv@a@m", number.to_bytes(8, "big"), msgspec.msgpack.encode(value)))

        with index_server("--engine", f"name=a,endpoint=tcp://127.0.0.1:{port}") as server:
            question = {"prompt": {"tokens": list(range(2, 22)), "model": "m"}}

            def blocks() -> int:
                rows = server.post("/v1/score", question)["engines"]
                return rows[0]["blocks"] if rows else 0

            def joined() -> bool:
                publish(0, batch(1, 5))
                return blocks() == 5

            wait_until(joined, "the first batch")
            publish(1, batch(6, 1))
            wait_until(lambda: blocks() == 6, "the second batch")
            socket.send_multipart((b"x",))
            publish(3, batch(1, 2))
            wait_until(lambda: blocks() == 2, "the batch after the hole")
            source = server.get("/v1/engines")["sources"]["a"]
            assert (source["streams"][0]["gaps"], source["garbage"]) == (1, 1)
            assert any("lost" in line for line in server.log)


def test_pyzmq_hears_our_publisher_and_its_replays(vllm_installed: None) -> None:
    """`kvcellar events publish` as any subscriber of vLLM would take it."""
    # The second is for replays.
    port = free_port(2)
    command = [sys.executable, "-m", "kvcellar", "events", "publish", "--engines", "1", "--port", str(port)]
    with (
        subprocess.Popen([*command, "--rate", "2000", "--blocks", "100"]) as process,
        zmq.Context() as context,
        context.socket(zmq.SUB) as live,
        context.socket(zmq.DEALER) as asking,
    ):
        try:
            for socket in (live, asking):
                socket.set(zmq.LINGER, 0)
            live.subscribe(b"")
            live.connect(f"tcp://127.0.0.1:{port}")
            assert live.poll(deadline(20.0) * 1000), "no batch came"
            _, number, payload = live.recv_multipart()
            kinds = {event["type"] for event in msgspec.msgpack.decode(payload)[1]}
            assert "BlockStored" in kinds
            asking.connect(f"tcp://127.0.0.1:{port + 1}")
            asking.send_multipart((b"", (0).to_bytes(8, "big")))
            replayed = []
            while True:
                assert asking.poll(deadline(20.0) * 1000), "the replay did not end"
                _, _, at, body = asking.recv_multipart()
                if at == b"\xff" * 8:
                    break
                replayed.append((int.from_bytes(at, "big"), body))
            assert [at for at, _ in replayed] == list(range(len(replayed)))
            assert (int.from_bytes(number, "big"), payload) in replayed
        finally:
            process.terminate()
            process.wait(deadline(15.0))


def test_what_was_recorded_plays_as_the_same_blocks(vllm_installed: None, tmp_path: Path) -> None:
    """Tail, record and replay; the recording holds no token."""
    port = free_port(2)
    publisher = Publisher(port)
    source = f"name=a,endpoint=tcp://127.0.0.1:{port},replay=tcp://127.0.0.1:{port + 1}"
    publisher.inner.publish(batch(500_000, 3))
    publisher.inner.publish(batch(1, 10))
    time.sleep(0.5)
    recording = tmp_path / "events.jsonl"
    events = [sys.executable, "-m", "kvcellar", "events"]
    arguments = ["--engine", source, "--seconds", f"{deadline(3.0):.0f}"]
    patience_s = deadline(60.0)
    subprocess.run([*events, "record", *arguments, "--output", str(recording)], check=True, timeout=patience_s)
    tail = subprocess.run([*events, "tail", *arguments], check=True, timeout=patience_s, capture_output=True, text=True)
    publisher.close()
    rows = [json.loads(line) for line in tail.stdout.splitlines()]
    assert sum(row["stored_per_second"].get("gpu", 0) for row in rows) == 13
    text = recording.read_text()
    assert len(text.splitlines()) == 2
    assert "1000001" not in text, "a token id"
    play = free_port(2)
    with subprocess.Popen(
        [*events, "replay", str(recording), "--port", str(play), "--speed", "0", "--linger", f"{deadline(6.0):.0f}"],
        stderr=subprocess.DEVNULL,
    ) as process:
        try:
            played = f"name=b,endpoint=tcp://127.0.0.1:{play},replay=tcp://127.0.0.1:{play + 1}"
            with index_server("--engine", played) as server:
                wait_until(lambda: [row["blocks"] for row in server.get("/v1/engines")["engines"]] == [13], "13 blocks")
        finally:
            process.terminate()
            process.wait(deadline(15.0))


def block_chain(tokens: Sequence[int]) -> list[int]:
    """vLLM's names of all full blocks of a text."""
    from vllm.v1.core.kv_cache_utils import BlockHash, maybe_convert_block_hash

    names, parent = [], None
    for start in range(0, len(tokens) // BLOCK_TOKENS * BLOCK_TOKENS, BLOCK_TOKENS):
        parent = block_hash(parent, tuple(tokens[start : start + BLOCK_TOKENS]))
        names.append(int(maybe_convert_block_hash(BlockHash(parent))))
    return names


def truth(engine: Engine) -> dict[int, set[str]]:
    """Tiers of every block, from vLLM's block pool and from our engine, whose processes are this one."""
    from vllm.v1.core.kv_cache_utils import BlockHash, get_block_hash, maybe_convert_block_hash

    scheduler = engine.llm.llm_engine.engine_core.engine_core.scheduler
    held: dict[int, set[str]] = {}
    for key in scheduler.kv_cache_manager.block_pool.cached_block_hash_to_block._cache:
        held.setdefault(int(maybe_convert_block_hash(get_block_hash(key))), set()).add("gpu")
    for tier, digest, group in scheduler.connector._scheduler._engine.held():
        assert group == 0
        held.setdefault(int(maybe_convert_block_hash(BlockHash(digest))), set()).add(TIERS[tier])
    return held


def view(server: IndexServer, texts: Sequence[Sequence[int]]) -> dict[int, set[str]]:
    """Tiers of every block of these texts, from the index."""
    seen: dict[int, set[str]] = {}
    for text in texts:
        keys = server.post("/v1/keys", {"tokens": list(text)})["keys"]
        for name, key in zip(block_chain(text), keys, strict=True):
            if name not in seen:
                holders = server.get(f"/v1/blocks/{key}")["holders"]
                seen[name] = {tier for holder in holders for tier in holder["tiers"]}
    return {name: tiers for name, tiers in seen.items() if tiers}


def assert_true(server: IndexServer, engine: Engine, texts: Sequence[Sequence[int]], when: str) -> dict[str, int]:
    """The index says what is so, block by block and tier by tier. Returns blocks by tier."""
    end = time.monotonic() + deadline(20.0)
    while True:
        expected, found = truth(engine), view(server, texts)
        counted = sum(row["blocks"] for row in server.get("/v1/engines")["engines"])
        if (expected == found and counted == len(expected)) or time.monotonic() > end:
            break
        engine.settle()
        time.sleep(0.2)
    wrong = {name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name)}
    sample = [(name, expected.get(name), found.get(name)) for name in sorted(wrong)[:5]]
    assert not wrong, f"{when}: {len(wrong)} of {len(expected)} blocks differ: {sample}"
    assert counted == len(expected), f"{when}: the index holds {counted} blocks, the engine {len(expected)}"
    tiers = [tier for held in expected.values() for tier in held]
    return {tier: tiers.count(tier) for tier in ("gpu", "cpu", "storage_local")}


@pytest.fixture
def endpoint() -> Iterator[str]:
    """A directory of sockets for one publisher."""
    with temporary_pool_dir() as directory:
        yield f"ipc://{directory}"


def test_the_index_says_what_the_real_engine_holds(tmp_path: Path, seed: int, endpoint: str) -> None:
    """Traffic, evictions, spills, a reset of vLLM's cache, and a restart."""
    from vllm.config.kv_events import KVEventsConfig

    rng = Random(f"index-{seed}")
    events = KVEventsConfig(
        enable_kv_cache_events=True,
        publisher="zmq",
        endpoint=f"{endpoint}/events.sock",
        replay_endpoint=f"{endpoint}/replay.sock",
    )
    texts: list[list[int]] = []

    def traffic(engine: Engine, count: int) -> None:
        for _ in range(count):
            beginning = rng.choice(texts)[: rng.randrange(0, 400)] if texts and rng.random() < 0.5 else []
            tokens = [*beginning, *prompt(rng, rng.randint(150, 400))]
            answer = engine.complete(tokens, ANSWER_TOKENS)
            texts.append([*tokens, *answer.tokens])
        engine.settle()

    source = f"name=a,endpoint={endpoint}/events.sock,replay={endpoint}/replay.sock"
    said = []
    with (
        temporary_disk_dir() as disk,
        temporary_pool_dir() as pool_dir,
        index_server("--engine", source) as server,
    ):
        cellar = {"dram_size": kv_mib(64), "nvme_dir": str(disk), "nvme_size": kv_mib(1024), "namespace_salt": "index"}
        for part in range(2):
            with open_engine(
                tmp_path,
                pool_dir,
                cellar=cellar,
                name=f"index-{part}",
                env={"VLLM_ENABLE_V1_MULTIPROCESSING": "0"},
                num_gpu_blocks_override=KV_BLOCKS,
                kv_events_config=events,
            ) as engine:
                if part == 1:
                    engine.settle()
                    said.append(assert_true(server, engine, texts, "after the restart"))
                    assert said[-1]["storage_local"] > 0, "nothing survived"
                traffic(engine, shrunk(40, 20))
                said.append(assert_true(server, engine, texts, "after traffic"))
                engine.reset_gpu_cache()
                engine.settle()
                said.append(assert_true(server, engine, texts, "after a reset of vLLM's cache"))
                traffic(engine, 5)
                said.append(assert_true(server, engine, texts, "after the reset"))
        assert all(said[0].values()), said
    print("; ".join(map(str, said)))
