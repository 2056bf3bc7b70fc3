"""Hits of a real engine against an independent model: exactly, with a working set of four times vLLM's own cache."""

import json
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.deadlines import deadline
from tests.vllm import oplog
from tests.vllm.cache_model import DramTier, Replay
from tests.vllm.engines import Engine, open_engine
from tests.vllm.gpu_model import PrefixCache
from tests.vllm.hit_model import HitModel
from tests.vllm.places import temporary_pool_dir
from tests.vllm.processes import wait_until
from tests.vllm.prompts import Conversation
from tests.vllm.server import BLOCK_TOKENS, KV_BLOCKS
from tests.vllm.sizes import kv_mib

# Prompts are computed in chunks that end in the middle of blocks.
CHUNK_TOKENS = 200
ANSWER_TOKENS = 4
CONVERSATIONS = 8
# All conversations at their ends: 4 x 64 blocks of vLLM's own cache.
LIMIT_TOKENS = 1000


@pytest.fixture(scope="module")
def record(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the engine records its requests."""
    return tmp_path_factory.mktemp("record") / "requests.jsonl"


@pytest.fixture(scope="module")
def engine(vllm_installed: None, tmp_path_factory: pytest.TempPathFactory, record: Path) -> Iterator[Engine]:
    """A small KV cache, and a pool that holds more than it but not the working set. Bytes of all loads are verified."""
    with temporary_pool_dir() as pool_dir:
        cellar = {
            "dram_size": kv_mib(100),
            "namespace_salt": "hit-model",
            "verify_loads": True,
            "record_trace": str(record),
        }
        options: dict[str, Any] = {"num_gpu_blocks_override": KV_BLOCKS, "max_num_batched_tokens": CHUNK_TOKENS}
        with open_engine(
            tmp_path_factory.mktemp("hit-model"), pool_dir, cellar=cellar, one_process=True, **options
        ) as engine:
            yield engine


def conversations(seed: int, turn_tokens: tuple[int, int]) -> list[Conversation]:
    return [Conversation(random.Random(f"{seed}-{lane}"), turn_tokens, LIMIT_TOKENS) for lane in range(CONVERSATIONS)]


def assert_all_loaded_bytes_were_verified(engine: Engine) -> None:
    """For each test that loads: two of them need not run in one process."""
    metrics = engine.settle()
    assert metrics.cellar("verified_loads_total") == metrics.cellar("hit_blocks_total", tier="dram") > 0
    assert metrics.cellar("load_failures_total") == 0


def check_record(record: Path, model: HitModel, engine: Engine) -> None:
    """A line for each request, with its lengths and where its tokens came from; and it can be replayed."""
    lines = lambda: [json.loads(line) for line in record.read_text().splitlines()]  # noqa: E731
    wait_until(lambda: len(lines()) == len(engine.served), "the record")
    found = lines()
    assert [line["input_length"] for line in found] == [len(request.prompt) for request in engine.served]
    assert sum(line["local_tokens"] for line in found) == model.local_tokens
    assert sum(line["dram_tokens"] for line in found) == model.external_tokens
    assert [line["output_length"] for line in found] == [len(request.answer) for request in engine.served]
    assert not any(line["nvme_tokens"] for line in found)
    seen: dict[tuple[int, ...], int] = {}
    for line, request in zip(found, engine.served, strict=True):
        for at in range(len(request.prompt) // BLOCK_TOKENS):
            prefix = tuple(request.prompt[: (at + 1) * BLOCK_TOKENS])
            assert seen.setdefault(prefix, line["hash_ids"][at]) == line["hash_ids"][at]
    assert len(set(seen.values())) == len(seen)
    command = [sys.executable, "-m", "kvcellar", "simulate", str(record), "--block-tokens", str(BLOCK_TOKENS), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=deadline(60.0))
    assert done.returncode == 0, done.stderr


def test_at_concurrency_one_hits_equal_a_prediction_from_prompts_alone(engine: Engine, record: Path, seed: int) -> None:
    rng = random.Random(seed)
    before = engine.settle()
    slots = before.slots("total")
    assert KV_BLOCKS < slots < 4 * KV_BLOCKS, f"{slots} slots make no test of eviction"
    model = HitModel(PrefixCache(KV_BLOCKS), DramTier(slots), BLOCK_TOKENS, CHUNK_TOKENS)
    lanes = conversations(seed, (120, 260))
    while lanes:
        lane = rng.choice(lanes)
        tokens = lane.ask(ANSWER_TOKENS)
        if tokens is None:
            lanes.remove(lane)
            continue
        lane.hear(engine.complete(tokens, ANSWER_TOKENS).tokens)
        after = engine.settle()
        for request in engine.served[model.served :]:
            model.serve(request.prompt, request.answer)
        where = f"after {len(tokens)} tokens, request {model.served}, seed {seed}"
        assert after.local_hit_tokens == model.local_tokens, f"the model of vLLM's own cache is wrong {where}"
        assert after.hit_tokens == model.external_tokens, where
        assert after.cellar("stored_blocks_total") == model.stored_blocks, where
        assert after.cellar("evicted_blocks_total", tier="dram") == model.evicted_blocks, where
    assert min(model.external_tokens, model.local_tokens, model.evicted_blocks) > 0, "the workload proves nothing"
    assert any(hit.local and hit.external for hit in model.history), "no request continued a local hit"
    Replay(BLOCK_TOKENS).run(engine.trace())
    assert_all_loaded_bytes_were_verified(engine)
    check_record(record, model, engine)


def test_at_eight_conversations_the_replay_agrees(engine: Engine, seed: int) -> None:
    before = engine.settle()
    begun = len(engine.trace())
    # The second time the first turns are known, to whichever cache still has them.
    turns = [turn for _ in range(2) for turn in engine.converse(conversations(seed + 1, (120, 300)), ANSWER_TOKENS)]
    after = engine.settle()
    ops = engine.trace()
    replay = Replay(BLOCK_TOKENS).run(ops)
    counts = f"{len(turns)} answers, {replay.lookups} lookups, {replay.waits} waits, {replay.hit_tokens} hit tokens"
    counts += f", seed {seed}"
    print(counts)
    assert replay.hit_tokens == oplog.hit_tokens(ops) == after.hit_tokens, counts
    assert after.cellar("stored_blocks_total") == replay.stored_blocks - replay.lost_blocks
    assert after.cellar("evicted_blocks_total", tier="dram") == replay.evicted_blocks
    assert after.cellar("dropped_blocks_total") == replay.dropped_blocks + replay.lost_blocks
    assert oplog.hit_tokens(ops[begun:]) > 0, "nothing was hit at concurrency 8"
    assert len({op["req"] for op in ops[begun:] if op["op"] == "store"}) > CONVERSATIONS
    assert after.cellar("evicted_blocks_total", tier="dram") > before.cellar("evicted_blocks_total", tier="dram")
    assert replay.states > 0
    assert not after.leftovers()
    assert_all_loaded_bytes_were_verified(engine)
