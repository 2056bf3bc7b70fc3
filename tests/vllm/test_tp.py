"""Several ranks on one machine: tensor parallel and pipeline parallel, each rank with its own part of every slot."""

import os
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.vllm import tiny_models
from tests.vllm.answers import assert_identical
from tests.vllm.cache_model import Need, Replay, whole_prefix
from tests.vllm.engines import Engine, open_engine
from tests.vllm.kinds import KINDS
from tests.vllm.places import temporary_pool_dir
from tests.vllm.prompts import prompt
from tests.vllm.server import BLOCK_TOKENS
from tests.vllm.sizes import kv_mib

ANSWER_TOKENS = 12
RANKS = 2
LENGTHS = [blocks * BLOCK_TOKENS + more for blocks in (2, 5, 9, 17) for more in (0, 1, -1)]


@pytest.fixture(scope="module")
def model(vllm_installed: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny Llama, whose heads two ranks can share."""
    return tiny_models.llama(tmp_path_factory.mktemp("llama"))


PIPELINE = pytest.param("pipeline_parallel_size", marks=pytest.mark.soak)


@pytest.fixture(scope="module", params=["tensor_parallel_size", PIPELINE])
def engine(request: pytest.FixtureRequest, model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    """An engine of two ranks, each bound to one core."""
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < RANKS:
        pytest.skip(f"{RANKS} ranks need {RANKS} cores, this process may use {len(cores)}")
    with temporary_pool_dir() as pool_dir:
        cellar = {"dram_size": kv_mib(64), "namespace_salt": request.param, "verify_loads": True}
        options: dict[str, Any] = {
            "model": model,
            "skip_tokenizer_init": True,
            "max_num_batched_tokens": 1024,
            request.param: RANKS,
        }
        env = {"VLLM_CPU_OMP_THREADS_BIND": "|".join(str(core) for core in cores[:RANKS])}
        if request.param == "pipeline_parallel_size":
            skip_unless_vllm_can(tmp_path_factory.mktemp("alone"), pool_dir, env, options)
        with open_engine(tmp_path_factory.mktemp("ranks"), pool_dir, cellar=cellar, env=env, **options) as engine:
            yield engine


def skip_unless_vllm_can(work_dir: Path, pool_dir: Path, env: dict[str, str], options: dict[str, Any]) -> None:
    """vLLM 0.32's CPU build dies in the first pipeline-parallel step, with and without a connector."""
    with open_engine(work_dir, pool_dir, cellar=None, env=env, **options) as alone:
        try:
            alone.complete(list(range(10, 100)), 4)
        except Exception as error:  # noqa: BLE001  (whatever kills vLLM without us)
            pytest.skip(f"vLLM alone cannot run pipeline parallel here: {error!r}")


def test_two_ranks_give_identical_logprobs_after_a_dram_hit(engine: Engine, seed: int) -> None:
    rng = random.Random(seed)
    prompts = [prompt(rng, length, 10, tiny_models.VOCABULARY - 1) for length in LENGTHS]
    for tokens in prompts:
        engine.complete(tokens, ANSWER_TOKENS)
    references = [engine.complete(tokens, ANSWER_TOKENS) for tokens in prompts]
    assert all(reference.cached_tokens > 0 for reference in references), "a reference was no GPU-cache hit"
    for tokens, reference in zip(prompts, references, strict=True):
        engine.settle()
        engine.reset_gpu_cache()
        before = engine.metrics()
        answer = engine.complete(tokens, ANSWER_TOKENS)
        after = engine.metrics()
        wanted = (len(tokens) - 1) // BLOCK_TOKENS * BLOCK_TOKENS
        # Once for all ranks, and the same number that vLLM itself saw.
        assert after.hit_tokens - before.hit_tokens == wanted
        assert (
            after.value("vllm:external_prefix_cache_hits_total") - before.value("vllm:external_prefix_cache_hits_total")
            == wanted
        )
        assert_identical(reference, answer, f"{len(tokens)} tokens, seed {seed}")
    final = engine.settle()
    assert final.cellar("verified_loads_total") > 0
    assert final.cellar("load_failures_total") == 0
    assert not final.leftovers()
    Replay(BLOCK_TOKENS).run(engine.trace())


def assert_hits_of_two_ranks(
    work_dir: Path, block: int, needs: tuple[Need, ...], seed: int, salt: str, **options: Any
) -> None:
    """An engine of two ranks answers after our hits as after its own, which end at the same tokens."""
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < RANKS:
        pytest.skip(f"{RANKS} ranks need {RANKS} cores, this process may use {len(cores)}")
    rng = random.Random(seed)
    prompts = [
        prompt(rng, blocks * block + more, 10, tiny_models.VOCABULARY - 1)
        for blocks in (1, 4, 9)
        for more in (0, 1, -1)
    ]
    cellar = {"dram_size": kv_mib(64), "namespace_salt": salt, "verify_loads": True}
    options = {"skip_tokenizer_init": True, "max_num_batched_tokens": 256, "tensor_parallel_size": RANKS, **options}
    env = {"VLLM_CPU_OMP_THREADS_BIND": "|".join(str(core) for core in cores[:RANKS])}
    with (
        temporary_pool_dir() as pool_dir,
        open_engine(work_dir, pool_dir, cellar=cellar, env=env, **options) as engine,
    ):
        for tokens in prompts:
            engine.complete(tokens, ANSWER_TOKENS)
        references = [engine.complete(tokens, ANSWER_TOKENS) for tokens in prompts]
        before = engine.settle()
        for tokens, reference in zip(prompts, references, strict=True):
            engine.reset_gpu_cache()
            answer = engine.complete(tokens, ANSWER_TOKENS)
            assert_identical(reference, answer, f"{salt}, {len(tokens)} tokens, seed {seed}")
        final = engine.settle()
        assert final.hit_tokens - before.hit_tokens == sum(reference.cached_tokens for reference in references) > 0
        assert final.cellar("verified_loads_total") > 0
        assert final.cellar("load_failures_total") == 0
        assert not final.leftovers()
        Replay(block, needs).run(engine.trace())


@pytest.mark.parametrize("name", ["gated_delta_net", "chunked_local"])
def test_two_ranks_keep_their_shards_of_states_and_chunks(
    name: str, vllm_installed: None, tmp_path: Path, seed: int
) -> None:
    """As above, with groups of several kinds."""
    kind = KINDS[name]
    model = kind.make(tmp_path / "model")
    assert_hits_of_two_ranks(tmp_path, BLOCK_TOKENS, kind.needs, seed, name, model=model, dtype=kind.dtype)


@pytest.mark.parametrize("interleave", [1, 8])
def test_two_ranks_keep_the_tokens_of_a_block_between_them(
    interleave: int, vllm_installed: None, tmp_path: Path, seed: int
) -> None:
    """Decode context parallelism, with attention of the test's own. A block is twice as long."""
    assert_hits_of_two_ranks(
        tmp_path,
        RANKS * BLOCK_TOKENS,
        (whole_prefix,),
        seed,
        "context parallel",
        model=tiny_models.llama(tmp_path / "model", kv_heads=1),
        decode_context_parallel_size=RANKS,
        cp_kv_cache_interleave_size=interleave,
        worker_cls="tests.vllm.context_parallel.Worker",
    )
