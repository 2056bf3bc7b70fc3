"""Features of vLLM beside which nobody had tried us, each end to end: hits where they are right, and nothing else."""

import contextlib
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.deadlines import deadline
from tests.vllm import oplog, reuse, tiny_models
from tests.vllm.answers import Answer, assert_identical, differences
from tests.vllm.engine_process import start_engine
from tests.vllm.engines import Engine, open_engine
from tests.vllm.places import real_model, temporary_disk_dir, temporary_pool_dir
from tests.vllm.prompts import prompt
from tests.vllm.reuse import TINY, Reuse, assert_identity, three_answers, whole_blocks
from tests.vllm.server import BLOCK_TOKENS, SETTLE_S

PROMPT_TOKENS = 6 * BLOCK_TOKENS + 5
CELLAR: dict[str, object] = {"dram_size": "64MiB", "verify_loads": True}
ASKED_FOR: dict[str, object] = {**CELLAR, "without_prefix_caching": True}
WITHOUT: dict[str, Any] = {"enable_prefix_caching": False}

pytestmark = [pytest.mark.usefixtures("vllm_installed"), pytest.mark.e2e]


@pytest.fixture
def rng(seed: int, request: pytest.FixtureRequest) -> random.Random:
    return random.Random(f"{request.node.name}-{seed}")


@pytest.fixture
def tokens(rng: random.Random) -> list[int]:
    return some_prompt(rng)


@pytest.fixture(scope="module")
def llama(vllm_installed: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.llama(tmp_path_factory.mktemp("features") / "llama")


@pytest.fixture
def pool_dir() -> Iterator[Path]:
    with temporary_pool_dir() as path:
        yield path


def some_prompt(rng: random.Random, length: int = PROMPT_TOKENS) -> list[int]:
    return prompt(rng, length, first=0, last=tiny_models.VOCABULARY - 1)


@contextlib.contextmanager
def started(
    work_dir: Path, pool_dir: Path, model: Path, name: str, *, cellar: dict[str, object] | None = CELLAR, **options: Any
) -> Iterator[Engine]:
    options = {**TINY, **options}
    with open_engine(work_dir, pool_dir, cellar=cellar, model=model, name=name, one_process=True, **options) as engine:
        yield engine


def test_without_prefix_caching_vllm_serves_without_us(
    llama: Path, tmp_path: Path, pool_dir: Path, tokens: list[int]
) -> None:
    with started(tmp_path, pool_dir, llama, "off", **WITHOUT) as engine:
        answers = [reuse.ask(engine, tokens) for _ in range(2)]
    assert [answer.cached_tokens for answer in answers] == [0, 0]
    assert_identical(*answers, "the same without us")
    assert not list(pool_dir.iterdir()), "a pool that nobody uses"


def test_without_prefix_caching_hits_of_ours_are_identical_where_they_are_asked_for(
    llama: Path, tmp_path: Path, pool_dir: Path, tokens: list[int]
) -> None:
    with started(tmp_path, pool_dir, llama, "reference", cellar=None) as engine:
        reuse.ask(engine, tokens)
        reference = reuse.ask(engine, tokens)
    with started(tmp_path, pool_dir, llama, "on", cellar=ASKED_FOR, **WITHOUT) as engine:
        found = three_answers(engine, tokens, local_hits=False)
        assert engine.metrics().local_hit_tokens == 0
    assert found.cold.cached_tokens == 0
    assert found.hit_tokens == reference.cached_tokens == whole_blocks(tokens)
    assert_identical(reference, found.ours, "without prefix caching")


def scale_weights(worker: Any) -> None:
    """As a trainer that writes new weights into a running engine."""
    import torch

    with torch.no_grad():
        for parameter in worker.model_runner.model.parameters():
            parameter.mul_(1.05)


def trained(engine: Engine, tokens: list[int], other: list[int]) -> tuple[Answer, Reuse]:
    """Stores what the files' weights compute, then what scaled ones do."""
    of_files = reuse.ask(engine, tokens)
    engine.settle()
    engine.llm.collective_rpc(scale_weights)
    engine.reset_all()
    scaled = three_answers(engine, tokens)
    reuse.ask(engine, other)
    engine.settle()
    return of_files, scaled


def after_a_reset(engine: Engine, tokens: list[int]) -> tuple[Reuse, Answer, int]:
    found = three_answers(engine, tokens)
    engine.reset_all()
    return found, *reuse.from_us(engine, tokens)


def each(engine: Engine, *prompts: list[int]) -> list[Answer]:
    answers = [reuse.ask(engine, tokens) for tokens in prompts]
    reuse.ask(engine, [1, 2, 3])
    return answers


def in_a_process(  # noqa: PLR0917  (read by place: where, with what, and what is asked)
    work_dir: Path, pool_dir: Path, model: Path, name: str, cellar: Any, function: Any, *what: Any
) -> Any:
    """One start and one call. Of weights written after a process began nothing is shared, so this one begins now."""
    with start_engine(work_dir, pool_dir, cellar=cellar, model=model, name=name, **TINY) as engine:
        engine.wait_ready()
        return engine.call(function, *what)


def test_what_weights_of_a_running_engine_computed_is_never_used_by_a_start_from_files(
    llama: Path, tmp_path: Path, pool_dir: Path, tokens: list[int], rng: random.Random
) -> None:
    prompts = tokens, some_prompt(rng)
    with temporary_disk_dir() as disk_dir:
        cellar = {**CELLAR, "nvme_dir": str(disk_dir), "nvme_size": "64MiB"}
        of_files, scaled = in_a_process(tmp_path, pool_dir, llama, "trained", cellar, trained, *prompts)
        assert_identity(scaled, tokens, "weights of this process")
        assert differences(of_files, scaled.cold) > 0, "the scaling shows nowhere: this test proves nothing"
        answers = in_a_process(tmp_path, pool_dir, llama, "from-files", cellar, each, *prompts)
    references = in_a_process(tmp_path, pool_dir, llama, "without-us", None, each, *prompts)
    for answer, reference in zip(answers, references, strict=True):
        assert answer.cached_tokens == 0
        assert_identical(reference, answer, "after a start from files")


def test_with_on_reset_keep_hits_outlive_a_reset_and_a_restart(
    llama: Path, tmp_path: Path, pool_dir: Path, tokens: list[int]
) -> None:
    cellar = {**CELLAR, "on_reset": "keep"}
    found, answer, hit_tokens = in_a_process(tmp_path, pool_dir, llama, "first", cellar, after_a_reset, tokens)
    assert_identity(found, tokens, "before the reset")
    assert hit_tokens == whole_blocks(tokens)
    assert_identical(found.ours, answer, "after the reset")
    (answer,) = in_a_process(tmp_path, pool_dir, llama, "second", cellar, each, tokens)
    assert answer.cached_tokens == whole_blocks(tokens)
    assert_identical(found.ours, answer, "after the restart")


def embedding(engine: Engine, tokens: list[int]) -> list[float]:
    (output,) = engine.llm.embed([{"prompt_token_ids": tokens}], use_tqdm=False)
    return list(output.outputs.embedding)


def settle_without_a_sampler(engine: Engine) -> Any:
    """Lets all copies end and all numbers arrive, by embedding what is shorter than a block."""
    end = time.monotonic() + deadline(SETTLE_S)
    while time.monotonic() < end:
        embedding(engine, [1, 2, 3])
        if oplog.outstanding(engine.trace()) == 0:
            embedding(engine, [1, 2, 3])
            return engine.metrics()
        time.sleep(0.01)
    raise AssertionError("copies did not end")


def pooling(kind: str) -> dict[str, Any]:
    from vllm.config import PoolerConfig

    kinds = {"runner": "pooling", "convert": "embed", "pooler_config": PoolerConfig(seq_pooling_type=kind)}
    return {**kinds, "skip_tokenizer_init": False, "max_num_seqs": 4}


def test_mean_pooling_which_needs_whole_prompts_is_served_without_us(
    tmp_path: Path, pool_dir: Path, tokens: list[int]
) -> None:
    """Seen to end EngineCore at the second, equal text."""
    more = {"enable_prefix_caching": None, "enable_chunked_prefill": None, **pooling("MEAN")}
    with started(tmp_path, pool_dir, real_model(), "mean", **more) as engine:
        first, second = (embedding(engine, tokens) for _ in range(2))
    assert first == second
    assert len(set(first)) > 1
    assert not list(pool_dir.iterdir())


def test_last_pooling_is_identical_after_a_hit_of_ours(tmp_path: Path, pool_dir: Path, tokens: list[int]) -> None:
    with started(tmp_path, pool_dir, real_model(), "last", **pooling("LAST")) as engine:
        embedding(engine, tokens)
        local = embedding(engine, tokens)
        assert engine.metrics().local_hit_tokens == whole_blocks(tokens)
        settle_without_a_sampler(engine)
        engine.reset_gpu_cache()
        before = engine.metrics()
        ours = embedding(engine, tokens)
        after = settle_without_a_sampler(engine)
    assert after.hit_tokens - before.hit_tokens == whole_blocks(tokens)
    assert after.local_hit_tokens == before.local_hit_tokens
    assert ours == local
