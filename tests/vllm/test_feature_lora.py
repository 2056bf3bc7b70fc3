"""Answers under LoRA adapters: whose KV a block is follows from what is loaded, not from a name or a path."""

import os
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.vllm import reuse, tiny_models
from tests.vllm.answers import Answer, assert_identical, differences
from tests.vllm.engine_process import start_engine
from tests.vllm.engines import Engine
from tests.vllm.places import temporary_pool_dir
from tests.vllm.prompts import prompt
from tests.vllm.reuse import TINY, Reuse, whole_blocks
from tests.vllm.server import BLOCK_TOKENS

NAME = "sql"
OPTIONS: dict[str, Any] = {**TINY, "enable_lora": True, "max_loras": 2, "max_cpu_loras": 2, "max_lora_rank": 8}
CELLAR = {"dram_size": "64MiB", "verify_loads": True}

pytestmark = [pytest.mark.usefixtures("vllm_installed"), pytest.mark.e2e]


@pytest.fixture(scope="module")
def llama(vllm_installed: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.llama(tmp_path_factory.mktemp("lora") / "llama")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "adapter"


@pytest.fixture
def pool_dir() -> Iterator[Path]:
    with temporary_pool_dir() as path:
        yield path


@pytest.fixture
def tokens(seed: int) -> list[int]:
    return prompt(random.Random(f"lora-{seed}"), 6 * BLOCK_TOKENS + 5, first=0, last=tiny_models.VOCABULARY - 1)


def write(folder: Path, model: Path, seed: int) -> Path:
    """Writes an adapter, with time stamps that a later write cannot repeat."""
    tiny_models.adapter(folder, model, seed)
    for path in folder.iterdir():
        os.utime(path)
    return folder


def adapter(folder: Path, number: int = 1) -> Any:
    from vllm.lora.request import LoRARequest

    return LoRARequest(NAME, number, str(folder))


def introduce(engine: Engine, lora: Any) -> None:
    """Has the worker load the adapter and tell of it: before, requests with it are neither stored nor loaded."""
    reuse.ask(engine, [1, 2, 3], lora=lora, max_tokens=1)
    engine.settle()


def whole_way(engine: Engine, tokens: list[int], folder: Path) -> Reuse:
    introduce(engine, adapter(folder))
    return reuse.three_answers(engine, tokens, lora=adapter(folder))


def once(engine: Engine, tokens: list[int], folder: Path, number: int = 1) -> tuple[Answer, int, Answer]:
    """The answer, how many tokens we gave for it, and the answer without any cache."""
    lora = adapter(folder, number)
    introduce(engine, lora)
    answer, hit_tokens = reuse.from_us(engine, tokens, lora=lora)
    return answer, hit_tokens, reuse.cold(engine, tokens, lora=lora)


def load_again(engine: Engine, folder: Path) -> None:
    """As an operator who exchanges an adapter in a running engine."""
    load_again_running(engine, folder)
    engine.reset_gpu_cache()


def load_again_running(engine: Engine, folder: Path) -> None:
    """As `load_again`, beside requests."""
    assert engine.llm.llm_engine.remove_lora(1)
    assert engine.llm.llm_engine.add_lora(adapter(folder))


def without_cache(engine: Engine, tokens: list[int], folder: Path) -> Answer:
    return reuse.ask(engine, tokens, lora=adapter(folder))


def assert_nothing_stale(found: tuple[Answer, int, Answer], before: Answer, what: str) -> None:
    answer, hit_tokens, cold = found
    assert hit_tokens == 0, what
    assert_identical(cold, answer, what)
    assert differences(before, answer) > 0, f"{what}: the adapter shows nowhere, this test proves nothing"


def exchange_before_the_last_step(engine: Engine, tokens: list[int], folder: Path, model: Path) -> list[int]:
    """One request whose adapter is exchanged between its two steps; the second one completes a block.

    Returns its tokens, the generated ones too.
    """
    from vllm import SamplingParams

    front_end = engine.llm.llm_engine
    introduce(engine, adapter(folder))
    engine.reset_gpu_cache()
    params = SamplingParams(temperature=0.0, max_tokens=2, ignore_eos=True, detokenize=engine.detokenize)
    front_end.add_request("last", {"prompt_token_ids": tokens}, params, lora_request=adapter(folder))
    generated: list[int] = []
    while not generated:
        generated = [token for output in front_end.step() for token in output.outputs[0].token_ids]
    assert len(generated) == 1, "it ended before its adapter was exchanged"
    write(folder, model, seed=3)
    load_again_running(engine, folder)
    while front_end.has_unfinished_requests():
        generated = [token for output in front_end.step() for token in output.outputs[0].token_ids] or generated
    return [*tokens, *generated]


def test_a_request_that_ends_with_the_step_of_an_exchange_leaves_nothing_behind(
    llama: Path, folder: Path, tmp_path: Path, pool_dir: Path, tokens: list[int]
) -> None:
    """Its last block was computed with the new adapter, under the old one's name."""
    write(folder, llama, seed=1)
    prompt_tokens = tokens[: 4 * BLOCK_TOKENS - 1]
    with start_engine(tmp_path, pool_dir, cellar=CELLAR, model=llama, **OPTIONS) as engine:
        engine.wait_ready()
        whole = engine.call(exchange_before_the_last_step, prompt_tokens, folder, llama)
        assert len(whole) == 4 * BLOCK_TOKENS + 1
        write(folder, llama, seed=1)
        engine.call(load_again, folder)
        answer, hit_tokens, cold = engine.call(once, whole, folder)
        assert hit_tokens == 0
        assert_identical(cold, answer, "with the first adapter again")


def after_an_exchange_beside_vllms_cache(
    engine: Engine, tokens: list[int], folder: Path, model: Path
) -> tuple[Answer, tuple[Answer, int, Answer]]:
    """An adapter is exchanged at its path, and vLLM still has the old one's blocks under its name."""
    introduce(engine, adapter(folder))
    engine.reset_gpu_cache()
    reuse.ask(engine, tokens, lora=adapter(folder))
    write(folder, model, seed=3)
    load_again_running(engine, folder)
    introduce(engine, adapter(folder))
    mixed = reuse.ask(engine, tokens, lora=adapter(folder))
    engine.settle()
    return mixed, once(engine, tokens, folder)


def test_what_vllm_itself_mixes_up_after_an_exchange_is_not_kept(
    llama: Path, folder: Path, tmp_path: Path, pool_dir: Path, tokens: list[int]
) -> None:
    """vLLM hashes an adapter's name: after an exchange it hits the old one's blocks, and computes on with the new."""
    write(folder, llama, seed=1)
    with start_engine(tmp_path, pool_dir, cellar=CELLAR, model=llama, **OPTIONS) as engine:
        engine.wait_ready()
        mixed, found = engine.call(after_an_exchange_beside_vllms_cache, tokens, folder, llama)
        assert mixed.cached_tokens > 0, "vLLM's own cache was emptied: this test proves nothing"
        answer, hit_tokens, cold = found
        assert hit_tokens == 0
        assert_identical(cold, answer, "with the exchanged adapter")
        assert differences(mixed, answer) > 0, "the adapter shows nowhere, this test proves nothing"


def test_in_one_process_adapters_share_nothing_but_what_is_the_same(
    llama: Path, folder: Path, tmp_path: Path, pool_dir: Path, tokens: list[int]
) -> None:
    write(folder, llama, seed=1)
    namesake = write(tmp_path / "namesake", llama, seed=2)
    with start_engine(tmp_path, pool_dir, cellar=CELLAR, model=llama, **OPTIONS) as engine:
        engine.wait_ready()
        first = engine.call(whole_way, tokens, folder)
        reuse.assert_identity(first, tokens, "under an adapter")

        found = engine.call(once, tokens, namesake, number=2)
        assert_nothing_stale(found, first.cold, "another adapter of the same name")

        write(folder, llama, seed=3)
        engine.call(load_again, folder)
        found = engine.call(once, tokens, folder)
        assert_nothing_stale(found, first.cold, "exchanged at the same path")

        write(folder, llama, seed=1)
        engine.call(load_again, folder)
        answer, hit_tokens, _ = engine.call(once, tokens, folder)
        assert hit_tokens == whole_blocks(tokens), "the first one is back, and what was stored with it"
        assert_identical(first.ours, answer, "the first one again")


def test_after_a_restart_the_same_adapter_hits_and_one_exchanged_at_its_path_does_not(
    llama: Path, folder: Path, tmp_path: Path, pool_dir: Path, tokens: list[int]
) -> None:
    def started(function: Any, name: str, *, cellar: Any = CELLAR) -> Any:
        with start_engine(tmp_path, pool_dir, cellar=cellar, model=llama, name=name, **OPTIONS) as engine:
            engine.wait_ready()
            return engine.call(function, tokens, folder)

    write(folder, llama, seed=1)
    first = started(whole_way, "first")
    reuse.assert_identity(first, tokens, "under an adapter")

    write(folder, llama, seed=2)
    found = started(once, "exchanged")
    assert_nothing_stale(found, first.cold, "exchanged before the restart")
    assert_identical(started(without_cache, "without-us", cellar=None), found[0], "an engine without us")

    write(folder, llama, seed=1)
    answer, hit_tokens, _ = started(once, "again")
    assert hit_tokens == whole_blocks(tokens)
    assert_identical(first.ours, answer, "the same after a restart")
