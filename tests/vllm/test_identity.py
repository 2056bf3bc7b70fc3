"""Answers after a dram hit equal those after a hit in vLLM's own cache: text and top-5 logprobs, bit for bit."""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from tests.vllm.answers import Answer, assert_identical
from tests.vllm.engines import Engine, open_engine
from tests.vllm.places import temporary_pool_dir
from tests.vllm.prompts import prompt
from tests.vllm.server import BLOCK_TOKENS
from tests.vllm.sizes import kv_mib

ANSWER_TOKENS = 8
ROUNDS = 3
BLOCKS = (2, 3, 4, 5, 7, 11)
LONG_TOKENS = 1445


@contextmanager
def started(tmp_path_factory: pytest.TempPathFactory, *, verify: bool, one_process: bool) -> Iterator[Engine]:
    options: dict[str, Any] = {"max_model_len": 2048, "max_num_batched_tokens": 2048, "one_process": one_process}
    with temporary_pool_dir() as pool_dir:
        cellar = {"dram_size": kv_mib(512), "namespace_salt": f"identity-{verify}", "verify_loads": verify}
        work_dir = tmp_path_factory.mktemp("identity")
        with open_engine(work_dir, pool_dir, cellar=cellar, **options) as engine:
            yield engine


@pytest.fixture(scope="module")
def engine(vllm_installed: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    """An engine as users run it."""
    with started(tmp_path_factory, verify=False, one_process=False) as engine:
        yield engine


def hit_length(tokens: int) -> int:
    """The longest hit of a prompt: the last block boundary that leaves a token to compute."""
    return (tokens - 1) // BLOCK_TOKENS * BLOCK_TOKENS


def compare(engine: Engine, prompts: list[list[int]], rounds: int) -> int:
    """Cold, then after a hit in vLLM's own cache, then `rounds` times after a dram hit. Returns the number of loads."""
    references: list[Answer] = []
    for tokens in prompts:
        engine.complete(tokens, ANSWER_TOKENS)
        local_before = engine.metrics().local_hit_tokens
        references.append(engine.complete(tokens, ANSWER_TOKENS))
        assert engine.metrics().local_hit_tokens - local_before == hit_length(len(tokens)), (
            "the reference was no GPU-cache hit"
        )
    loads = 0
    for round_number in range(rounds):
        for tokens, reference in zip(prompts, references, strict=True):
            # Before each one: an earlier prompt's load would leave a shared prefix in vLLM's own
            # cache.
            engine.settle()
            engine.reset_gpu_cache()
            before = engine.metrics()
            answer = engine.complete(tokens, ANSWER_TOKENS)
            after = engine.metrics()
            what = f"{len(tokens)} tokens, round {round_number}"
            assert after.hit_tokens - before.hit_tokens == hit_length(len(tokens)), f"{what}: no whole dram hit"
            assert after.local_hit_tokens == before.local_hit_tokens, f"{what}: vLLM's own cache had something"
            assert answer.cached_tokens == hit_length(len(tokens)), what
            assert_identical(reference, answer, what)
            loads += 1
    return loads


def test_fifty_dram_hits_are_identical_to_gpu_hits(engine: Engine, seed: int) -> None:
    rng = random.Random(seed)
    lengths = [blocks * BLOCK_TOKENS + more for blocks in BLOCKS for more in (0, 1, -1)] + [LONG_TOKENS]
    loads = compare(engine, [prompt(rng, length) for length in lengths], ROUNDS)
    print(f"{loads} loads compared, {loads * ANSWER_TOKENS} positions, seed {seed}")
    assert loads >= 50
    after = engine.settle()
    assert after.cellar("load_failures_total") == 0
    assert not after.leftovers()


def test_a_prefix_shared_with_another_prompt_is_identical_too(engine: Engine, seed: int) -> None:
    rng = random.Random(seed + 1)
    shared = prompt(rng, 5 * BLOCK_TOKENS)
    prompts = [shared + prompt(rng, length) for length in (1, BLOCK_TOKENS - 1, BLOCK_TOKENS, 40)]
    assert compare(engine, prompts, rounds=1) == len(prompts)


def test_verified_loads_are_identical_and_every_byte_is_right(
    vllm_installed: None, tmp_path_factory: pytest.TempPathFactory, seed: int
) -> None:
    rng = random.Random(seed + 2)
    lengths = [blocks * BLOCK_TOKENS + more for blocks in (2, 6) for more in (0, 1, -1)]
    with started(tmp_path_factory, verify=True, one_process=True) as engine:
        compare(engine, [prompt(rng, length) for length in lengths], rounds=2)
        after = engine.settle()
        assert after.cellar("verified_loads_total") == after.cellar("hit_blocks_total", tier="dram") > 0
        assert after.cellar("load_failures_total") == 0
