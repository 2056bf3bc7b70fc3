"""Our metrics on vLLM's /metrics: they exist, carry vLLM's labels, and agree with each other and with vLLM's own."""

import json
import random
from pathlib import Path

import pytest

from tests.vllm.places import pool_files, real_model
from tests.vllm.prompts import prompt
from tests.vllm.server import BLOCK_TOKENS, Server
from tests.vllm.sizes import DATA_TYPE

COUNTERS = (
    "offload_bytes",
    "load_bytes",
    "offload_seconds",
    "load_seconds",
    "hit_blocks",
    "hit_tokens",
    "miss_blocks",
    "miss_tokens",
    "evicted_blocks",
    "dropped_blocks",
    "stored_blocks",
    "load_failures",
    "verified_loads",
    "adopted_blocks",
    "saved_seconds",
    "what_if_blocks",
    "what_if_misses",
)
GAUGES = ("pool_slots", "pins", "leases", "fences", "pool_bytes", "pool_huge_bytes")


def block_bytes(model: Path) -> int:
    """Bytes of KV that one block takes: K and V of all layers."""
    config = json.loads((model / "config.json").read_text())
    head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    numbers = 2 * config["num_hidden_layers"] * config["num_key_value_heads"] * head_dim
    return int(numbers * DATA_TYPE.element_bytes * BLOCK_TOKENS)


def test_every_metric_is_there(shared_server: Server) -> None:
    families = shared_server.settle().families
    wanted = {f"vllm:kvcellar_{name}" for name in (*COUNTERS, *GAUGES, "lookup_seconds")}
    assert wanted <= families, f"missing: {sorted(wanted - families)}"


@pytest.mark.parametrize("name", ["pool_slots", "pins", "hit_tokens_total", "stored_blocks_total"])
def test_metrics_carry_the_labels_of_vllm(shared_server: Server, name: str) -> None:
    metrics = shared_server.settle()
    assert metrics.labels(f"vllm:kvcellar_{name}", "engine") == {"0"}
    assert metrics.labels(f"vllm:kvcellar_{name}", "model_name") == {"model"}


def test_numbers_agree_over_an_offload_and_a_load(shared_server: Server, seed: int) -> None:
    rng = random.Random(f"metrics-{seed}")
    tokens = prompt(rng, 9 * BLOCK_TOKENS + 5)
    payload = block_bytes(real_model())
    before = shared_server.settle()
    shared_server.complete(tokens)
    stored = shared_server.settle()

    def grew(name: str, **labels: str) -> float:
        return stored.cellar(name, **labels) - before.cellar(name, **labels)

    assert grew("stored_blocks_total") == 9
    assert grew("offload_bytes_total") == 9 * payload
    assert grew("offload_seconds_total") > 0
    assert (grew("miss_blocks_total"), grew("miss_tokens_total")) == (9, 9 * BLOCK_TOKENS)
    assert grew("hit_blocks_total", tier="dram") == 0
    assert shared_server.reset()
    shared_server.complete(tokens)
    before, stored = stored, shared_server.settle()
    assert (grew("hit_blocks_total", tier="dram"), grew("hit_tokens_total", tier="dram")) == (9, 9 * BLOCK_TOKENS)
    assert grew("load_bytes_total") == 9 * payload
    assert grew("load_seconds_total") > 0
    assert grew("stored_blocks_total") == grew("offload_bytes_total") == grew("miss_blocks_total") == 0
    assert grew("lookup_seconds_count") > 0
    theirs = "vllm:external_prefix_cache_hits_total"
    assert stored.value(theirs) - before.value(theirs) == 9 * BLOCK_TOKENS


def test_the_what_if_and_savings_follow_an_offload_and_a_load(shared_server: Server, seed: int) -> None:
    # One step of 149 tokens: long enough to say how fast prompts are computed.
    tokens = prompt(random.Random(f"what-if-{seed}"), 9 * BLOCK_TOKENS + 5)
    before = shared_server.settle()
    shared_server.complete(tokens)
    stored = shared_server.settle()
    assert shared_server.reset()
    shared_server.complete(tokens)
    loaded = shared_server.settle()

    def grew(name: str, **labels: str) -> tuple[float, float]:
        values = [metrics.cellar(name, **labels) for metrics in (before, stored, loaded)]
        return values[1] - values[0], values[2] - values[1]

    assert grew("what_if_blocks_total") == (9, 9)
    first, again = grew("what_if_misses_total", capacity="infinite")
    # Counted approximately, and what was looked up once is no miss any more.
    assert first == pytest.approx(9, abs=1) and again == 0
    assert loaded.labels("vllm:kvcellar_what_if_misses_total", "capacity") == {"now", "double", "infinite"}
    assert grew("saved_seconds_total", tier="dram")[1] > 0
    assert grew("saved_seconds_total", tier="nvme") == (0, 0)


def test_the_pool_adds_up(shared_server: Server) -> None:
    metrics = shared_server.settle()
    states = metrics.labels("vllm:kvcellar_pool_slots", "state")
    assert states == {"total", "free", "filling", "filled", "clean"}
    assert metrics.slots("total") == metrics.slots("free") + metrics.slots("filling") + metrics.slots("filled") > 0
    (pool,) = pool_files(shared_server.pool_dir)
    assert metrics.cellar("pool_bytes") == pool.stat().st_size
    assert metrics.cellar("load_failures_total") == 0
    assert not metrics.leftovers()
