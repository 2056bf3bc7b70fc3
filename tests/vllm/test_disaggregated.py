"""Prefill here, decode there: the real NIXL between two engines of vLLM, with ours in both, before it and after it.

Prompts are computed in the prefill engine with one token asked for, and the decode engine fetches their blocks with
what came back, as a router in front of disaggregated engines does it.
"""

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.deadlines import deadline
from tests.vllm import nixl, tiny_models
from tests.vllm.answers import Answer
from tests.vllm.engine_process import OverThereError
from tests.vllm.engines import Engine
from tests.vllm.places import temporary_pool_dir
from tests.vllm.prompts import prompt
from tests.vllm.references import cold, from_us, is_close
from tests.vllm.server import BLOCK_TOKENS, free_port, transfer_config

ANSWER_TOKENS = 8
ROUNDS = 2
LENGTHS = [2 * BLOCK_TOKENS, 5 * BLOCK_TOKENS + 1, 11 * BLOCK_TOKENS - 1]
ORDERS = {"nixl_first": ("nixl", "ours"), "ours_first": ("ours", "nixl")}
# Starting two engines counts, on cores that others use too.
pytestmark = pytest.mark.timeout(deadline(1200))
EXTERNAL = "vllm:external_prefix_cache_hits_total"


@pytest.fixture(scope="module")
def nixl_runs(vllm_installed: None) -> None:
    """Skips where NIXL is not installed or cannot run."""
    if (problem := nixl.why_not()) is not None:
        pytest.skip(f"NIXL cannot run here: {problem}")


@pytest.fixture(scope="module")
def model(nixl_runs: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny Llama."""
    return tiny_models.llama(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module", params=list(ORDERS))
def pair(request: pytest.FixtureRequest, model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[nixl.Pair]:
    """Both engines, with both connectors in one order."""
    work_dir = tmp_path_factory.mktemp("pair")
    with temporary_pool_dir() as pool_dir:
        transfers = {}
        for role in nixl.ROLES:
            pools = pool_dir / role
            pools.mkdir()
            settings = {"pool_dir": str(pools), "trace_file": str(work_dir / f"{role}.trace.jsonl")}
            ours = transfer_config({**settings, "dram_size": "64MiB", "verify_loads": True})
            children = {"nixl": nixl.connector(role), "ours": ours}
            order = [children[name] for name in ORDERS[request.param]]
            transfers[role] = nixl.beside(role, order, kv_load_failure_policy="recompute")
        options: dict[str, Any] = {
            "model": model,
            "skip_tokenizer_init": True,
            "dtype": "float32",
            "max_num_batched_tokens": 1024,
            "kv_cache_memory_bytes": 64 << 20,
        }
        with nixl.open_pair(work_dir, pool_dir, transfers, **options) as pair:
            for engine in (pair.prefill, pair.decode):
                engine.call(Engine.wait_in_service)
            yield pair


def tokens_of(rng: random.Random, length: int) -> list[int]:
    return prompt(rng, length, 0, tiny_models.VOCABULARY - 1)


def assert_right(pair: nixl.Pair, tokens: list[int], answer: Answer, what: str) -> None:
    """Against the decode engine's own answer, which nobody helped it with."""
    reference = pair.decode.call(cold, tokens, ANSWER_TOKENS)
    assert is_close(reference, answer), f"{what}: {answer} instead of {reference}"


def forget(pair: nixl.Pair) -> None:
    """vLLM's own caches become empty; that needs all blocks back, the handed-over ones too."""
    for engine in (pair.decode, pair.prefill):
        engine.call(Engine.settle)
        engine.call(Engine.reset_gpu_cache)


def test_handed_over_prompts_are_answered_as_without_us(pair: nixl.Pair, seed: int) -> None:
    rng = random.Random(f"hand-{seed}")
    for length in LENGTHS:
        tokens = tokens_of(rng, length)
        before = pair.decode.call(Engine.metrics).value(EXTERNAL)
        answer = pair.complete(tokens, ANSWER_TOKENS)
        fetched = pair.decode.call(Engine.metrics).value(EXTERNAL) - before
        assert fetched >= length - 1, "NIXL fetched nothing"
        assert_right(pair, tokens, answer, f"{length} tokens, seed {seed}")
    forget(pair)


def test_a_prompt_that_the_prefill_engine_loads_from_us_is_handed_over_right(pair: nixl.Pair, seed: int) -> None:
    tokens = tokens_of(random.Random(f"load-{seed}"), 9 * BLOCK_TOKENS + 5)
    pair.complete(tokens, ANSWER_TOKENS)
    forget(pair)
    before = pair.prefill.call(Engine.metrics).hit_tokens
    answer = pair.complete(tokens, ANSWER_TOKENS)
    assert pair.prefill.call(Engine.metrics).hit_tokens - before == 9 * BLOCK_TOKENS, "not loaded from us"
    assert_right(pair, tokens, answer, f"seed {seed}")
    forget(pair)


def test_what_the_decode_engine_loads_from_us_is_right_to_the_bit(pair: nixl.Pair, seed: int) -> None:
    rng = random.Random(f"bits-{seed}")
    loaded = 0
    for round_number in range(ROUNDS):
        tokens = tokens_of(rng, rng.randint(3, 12) * BLOCK_TOKENS + rng.randint(1, BLOCK_TOKENS - 1))
        # First it comes from the prefill engine, then it is computed here, then loaded here.
        pair.complete(tokens, ANSWER_TOKENS)
        forget(pair)
        for turn in range(3):
            hit, right = pair.decode.call(from_us, tokens, ANSWER_TOKENS)
            assert right, f"round {round_number}, turn {turn}, {hit} tokens hit, seed {seed}"
            loaded += hit > 0
    assert loaded >= ROUNDS, "hardly anything was loaded from us"
    forget(pair)


def test_the_prefill_engine_gets_its_blocks_back_when_we_load_instead(pair: nixl.Pair, seed: int) -> None:
    """The decode engine has the prompt already: whoever answers first, the other's blocks are let go."""
    tokens = tokens_of(random.Random(f"back-{seed}"), 7 * BLOCK_TOKENS + 3)
    for _ in range(2):
        pair.decode.call(Engine.complete, tokens, ANSWER_TOKENS)
        forget(pair)
        answer = pair.complete(tokens, ANSWER_TOKENS)
        # `forget` fails while the prefill engine waits for somebody to fetch its blocks.
        forget(pair)
        assert_right(pair, tokens, answer, f"seed {seed}")
    for engine in (pair.prefill, pair.decode):
        assert not engine.call(Engine.settle).leftovers()


def test_a_prefill_engine_that_cannot_be_reached_costs_time_and_nothing_else(pair: nixl.Pair, seed: int) -> None:
    tokens = tokens_of(random.Random(f"gone-{seed}"), 6 * BLOCK_TOKENS + 9)
    params = pair.hand_over(tokens)
    gone = {**params, "remote_engine_id": f"gone-{seed}", "remote_port": free_port()}
    answer, _ = pair.decode.call(Engine.transfer, tokens, ANSWER_TOKENS, gone)
    hit, right = pair.decode.call(from_us, tokens, ANSWER_TOKENS)
    assert right, f"{hit} tokens from us, seed {seed}"
    assert_right(pair, tokens, answer, f"without the prefill engine, seed {seed}")
    # The prefill engine gets its blocks back from whoever does reach it.
    pair.decode.call(Engine.reset_gpu_cache)
    pair.decode.call(Engine.transfer, tokens, 1, params)
    forget(pair)
    assert not pair.decode.call(Engine.settle).leftovers()


@pytest.mark.parametrize("order", list(ORDERS))
def test_a_typo_beside_nixl_is_named(model: Path, tmp_path: Path, order: str) -> None:
    """Ours refuses to start in its own words, not in NIXL's."""
    children = {"nixl": nixl.connector("prefill"), "ours": transfer_config({"dram_siez": "1GiB"})}
    transfer = nixl.beside("prefill", [children[name] for name in ORDERS[order]])
    with (
        temporary_pool_dir() as pool_dir,
        pytest.raises(OverThereError, match="dram_siez"),
        nixl.open_pair(tmp_path, pool_dir, {"prefill": transfer}, model=model, skip_tokenizer_init=True),
    ):
        pass
