"""KVEvents of the dram tier, as a real subscriber sees them."""

import os
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from tests.deadlines import deadline
from tests.vllm.cache_model import Replay
from tests.vllm.engines import Engine, open_heard
from tests.vllm.prompts import prompt
from tests.vllm.server import BLOCK_TOKENS
from tests.vllm.sizes import kv_mib
from tests.vllm.subscriber import Event, Subscriber

PROMPTS = 16
# Longer than the publisher's thread ever waits on a good machine.
QUIET_S = 0.3


@dataclass
class Run:
    """An engine and its subscriber."""

    engine: Engine
    subscriber: Subscriber

    def catch_up(self) -> None:
        """Waits until nothing more arrives after the engine has settled."""
        seen = -1
        while seen != len(self.subscriber.sequences):
            seen = len(self.subscriber.sequences)
            self.engine.settle()
            time.sleep(deadline(QUIET_S))


@pytest.fixture(scope="module")
def run(vllm_installed: None, tmp_path_factory: pytest.TempPathFactory, seed: int) -> Iterator[Run]:
    """Sixteen prompts through a pool that holds about half of their blocks, with loads in between."""
    rng = random.Random(f"events-{seed}")
    cellar = {"dram_size": kv_mib(64), "namespace_salt": "events"}
    with open_heard(tmp_path_factory.mktemp("events"), cellar=cellar) as (engine, subscriber):
        run = Run(engine, subscriber)
        prompts = [prompt(rng, rng.randint(150, 400)) for _ in range(PROMPTS)]
        for index, tokens in enumerate(prompts):
            engine.complete(tokens, 4)
            engine.settle()
            if index % 4 == 3:
                engine.reset_gpu_cache()
                engine.complete(prompts[index - 1] + prompt(rng, 50), 4)
        run.catch_up()
        yield run


def block_hash(parent: bytes | None, tokens: tuple[int, ...]) -> bytes:
    """vLLM's own hash of a block, from what an event tells."""
    from vllm.utils.hashing import sha256
    from vllm.v1.core.kv_cache_utils import DEFAULT_NONE_HASH_SEED, BlockHash, hash_block_tokens

    root = sha256(os.environ.get("PYTHONHASHSEED", DEFAULT_NONE_HASH_SEED))
    return bytes(hash_block_tokens(sha256, BlockHash(parent or root), tokens, None))


def blocks(event: Event) -> list[tuple[int, int | None, tuple[int, ...]]]:
    """Hash, parent's hash and tokens of every block of a BlockStored."""
    tokens = event["token_ids"]
    assert event["block_size"] == BLOCK_TOKENS
    assert len(tokens) == BLOCK_TOKENS * len(event["block_hashes"]), "token ids do not cover the blocks"
    parents = [event["parent_block_hash"], *event["block_hashes"]]
    cuts = [tuple(tokens[start : start + BLOCK_TOKENS]) for start in range(0, len(tokens), BLOCK_TOKENS)]
    return list(zip(event["block_hashes"], parents, cuts, strict=False))


def test_no_batch_was_lost(run: Run) -> None:
    assert run.subscriber.sequences == list(range(len(run.subscriber.sequences)))
    assert run.subscriber.of("BlockStored", "CPU")
    assert run.subscriber.of("BlockRemoved", "CPU")


def test_stored_events_explain_themselves(run: Run) -> None:
    known: dict[int, bytes] = {}
    for event in run.subscriber.events:
        if event["type"] != "BlockStored":
            continue
        for name, parent, tokens in blocks(event):
            assert parent is None or parent in known, f"block {name} has parent {parent}, which no earlier event stored"
            full = block_hash(known.get(parent) if parent is not None else None, tokens)
            assert name == int.from_bytes(full[-8:], "big"), "the hash is not the one of these tokens after this parent"
            known[name] = full
        if event["medium"] == "CPU":
            assert event["kv_cache_spec_kind"] == "full_attention"
            assert event["group_idx"] == 0
            assert event.get("lora_name") is None


def test_cpu_and_gpu_events_name_the_same_blocks_alike(run: Run) -> None:
    on_gpu = {block for event in run.subscriber.of("BlockStored", "GPU") for block in blocks(event)}
    on_cpu = {block for event in run.subscriber.of("BlockStored", "CPU") for block in blocks(event)}
    assert on_cpu
    assert on_cpu <= on_gpu


def cpu_blocks(run: Run) -> set[int]:
    """The dram tier's blocks as an index would keep them; complains about impossible transitions."""
    held: set[int] = set()
    for event in run.subscriber.events:
        if event.get("medium") != "CPU":
            continue
        hashes = event["block_hashes"]
        if event["type"] == "BlockStored":
            assert not held & set(hashes), "stored twice"
            held |= set(hashes)
        else:
            assert set(hashes) <= held, "removed without having been stored"
            held -= set(hashes)
    return held


def test_events_and_engine_agree_on_what_is_there(run: Run) -> None:
    ops = run.engine.trace()
    replay = Replay(BLOCK_TOKENS).run(ops)
    assert replay.evicted_blocks > 0, "nothing was evicted"
    full: dict[int, bytes] = {}
    for event in run.subscriber.of("BlockStored", "GPU"):
        for name, parent, tokens in blocks(event):
            full[name] = block_hash(full[parent] if parent is not None else None, tokens)
    by_events = {f"{full[name].hex()[:16]}:0" for name in cpu_blocks(run)}
    assert by_events == replay.resident()
    assert len(by_events) == run.engine.metrics().slots("filled")


def test_a_reset_removes_every_cpu_block(run: Run) -> None:
    assert cpu_blocks(run)
    run.engine.reset_all()
    run.catch_up()
    assert cpu_blocks(run) == set()
    run.engine.complete(run.engine.served[0].prompt, 4)
    run.catch_up()
    assert len(cpu_blocks(run)) == run.engine.metrics().slots("filled") > 0
