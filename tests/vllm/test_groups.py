"""Hybrid models: six KV cache groups, five of them with a sliding window, vLLM's hybrid cache manager on."""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.vllm import tiny_models
from tests.vllm.answers import Answer, assert_identical, differences
from tests.vllm.engines import Engine, open_engine
from tests.vllm.places import temporary_pool_dir
from tests.vllm.prompts import prompt
from tests.vllm.server import BLOCK_TOKENS
from tests.vllm.sizes import kv_mib

ANSWER_TOKENS = 16
LENGTHS = [blocks * BLOCK_TOKENS + more for blocks in (2, 3, 6, 12, 20) for more in (0, 1, -1)]


@pytest.fixture(scope="module")
def model(vllm_installed: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny hybrid model."""
    return tiny_models.hybrid(tmp_path_factory.mktemp("hybrid"))


@contextmanager
def started(
    model: Path, work_dir: Path, cellar: dict[str, object] | None, *, one_process: bool = False, **transfer: Any
) -> Iterator[Engine]:
    with temporary_pool_dir() as pool_dir:
        options: dict[str, Any] = {"skip_tokenizer_init": True, "max_num_batched_tokens": 1024}
        options["one_process"] = one_process
        with open_engine(work_dir, pool_dir, cellar=cellar, model=model, transfer=transfer, **options) as engine:
            yield engine


def prompts(seed: int) -> list[list[int]]:
    rng = random.Random(seed)
    return [prompt(rng, length, 10, tiny_models.VOCABULARY - 1) for length in LENGTHS]


def hit_length(tokens: list[int]) -> int:
    return (len(tokens) - 1) // BLOCK_TOKENS * BLOCK_TOKENS


def cold_and_gpu(engine: Engine, asked: list[list[int]]) -> list[tuple[Answer, Answer]]:
    """Each prompt twice: without any hit, and with the longest one that vLLM's own cache can give."""
    pairs = []
    for tokens in asked:
        pairs.append((engine.complete(tokens, ANSWER_TOKENS), engine.complete(tokens, ANSWER_TOKENS)))
        assert [answer.cached_tokens for answer in pairs[-1]] == [0, hit_length(tokens)]
    return pairs


def after_dram_hits(engine: Engine, asked: list[list[int]]) -> list[Answer]:
    """Each prompt once more with vLLM's own cache empty; every one must hit as far as a hit can go."""
    answers = []
    for tokens in asked:
        engine.settle()
        engine.reset_gpu_cache()
        before = engine.metrics().hit_tokens
        answers.append(engine.complete(tokens, ANSWER_TOKENS))
        hit = engine.metrics().hit_tokens - before
        assert hit == hit_length(tokens), f"{len(tokens)} tokens: {hit} hit tokens"
    return answers


@pytest.fixture(scope="module")
def with_us(
    model: Path, tmp_path_factory: pytest.TempPathFactory, seed: int
) -> Iterator[tuple[Engine, list[tuple[Answer, Answer]]]]:
    """A verified engine, and its cold and GPU-hit answers."""
    cellar = {"dram_size": kv_mib(128), "namespace_salt": "groups", "verify_loads": True}
    with started(model, tmp_path_factory.mktemp("groups"), cellar) as engine:
        yield engine, cold_and_gpu(engine, prompts(seed))


def test_the_model_has_six_groups(with_us: tuple[Engine, list[tuple[Answer, Answer]]]) -> None:
    engine, _ = with_us
    scheduler = engine.llm.llm_engine.vllm_config.scheduler_config
    assert not scheduler.disable_hybrid_kv_cache_manager, "the hybrid cache manager is off"
    stored = {key.rsplit(":", 1)[1] for op in engine.trace() if op["op"] == "store" for key in op["keys"]}
    assert stored == {str(group) for group in range(6)}


def test_dram_hits_are_identical_to_gpu_hits(with_us: tuple[Engine, list[tuple[Answer, Answer]]], seed: int) -> None:
    engine, references = with_us
    for tokens, (_, reference), answer in zip(
        prompts(seed), references, after_dram_hits(engine, prompts(seed)), strict=True
    ):
        assert_identical(reference, answer, f"{len(tokens)} tokens, seed {seed}")
    metrics = engine.settle()
    assert metrics.cellar("verified_loads_total") > 0
    assert metrics.cellar("load_failures_total") == 0
    assert not metrics.leftovers()


def test_answers_with_and_without_us_are_identical(
    model: Path, with_us: tuple[Engine, list[tuple[Answer, Answer]]], tmp_path: Path, seed: int
) -> None:
    """Against vLLM with a connector that does nothing.

    Having any connector changes the order in which vLLM frees blocks of a sliding window; on this model that alone
    moves one of 480 compared positions in its last bits.
    """
    _, ours = with_us
    idle = {"kv_connector": "IdleConnector", "kv_connector_module_path": "tests.vllm.mutants"}
    with started(model, tmp_path, {}, **idle) as engine:
        theirs = cold_and_gpu(engine, prompts(seed))
    for tokens, (cold, gpu_hit), (their_cold, their_gpu_hit) in zip(prompts(seed), ours, theirs, strict=True):
        assert_identical(their_cold, cold, f"cold, {len(tokens)} tokens, seed {seed}")
        assert_identical(their_gpu_hit, gpu_hit, f"GPU hit, {len(tokens)} tokens, seed {seed}")


def test_a_wrong_group_mapping_is_seen(model: Path, tmp_path: Path, seed: int) -> None:
    """The permanent mutation test: if this comparison finds nothing, the one above proves nothing."""
    mutant = {"kv_connector": "SwappedGroupsConnector", "kv_connector_module_path": "tests.vllm.mutants"}
    asked = prompts(seed)
    cellar: dict[str, object] = {"dram_size": kv_mib(128), "namespace_salt": "mutant"}
    with started(model, tmp_path, cellar, one_process=True, **mutant) as engine:
        references = [gpu_hit for _, gpu_hit in cold_and_gpu(engine, asked)]
        answers = after_dram_hits(engine, asked)
    differing = sum(differences(reference, answer) > 0 for reference, answer in zip(references, answers, strict=True))
    print(f"{differing} of {len(asked)} answers differ under the mutant, seed {seed}")
    assert differing > 0
