"""Prompts with an image: its blocks are kept under what the image is and how it was prepared."""

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.vllm import reuse, tiny_models
from tests.vllm.answers import assert_identical, differences
from tests.vllm.engine_process import start_engine
from tests.vllm.engines import Engine
from tests.vllm.places import temporary_pool_dir
from tests.vllm.prompts import prompt
from tests.vllm.server import BLOCK_TOKENS

TEXT_TOKENS = 2 * BLOCK_TOKENS + 7
HIT_TOKENS = (tiny_models.IMAGE_TOKENS + TEXT_TOKENS - 1) // BLOCK_TOKENS * BLOCK_TOKENS
OPTIONS: dict[str, Any] = {
    # In bfloat16 vLLM ends at this model's first step on a processor with AMX: it attends with
    # tiles before anything has asked the system for them.
    "dtype": "float32",
    "max_num_batched_tokens": 1024,
    "kv_cache_memory_bytes": 1 << 27,
    "limit_mm_per_prompt": {"image": 1},
}
CELLAR = {"dram_size": "64MiB", "verify_loads": True}

pytestmark = [pytest.mark.usefixtures("vllm_installed"), pytest.mark.e2e]


@pytest.fixture(scope="module")
def blip(vllm_installed: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.blip(tmp_path_factory.mktemp("images") / "blip")


@pytest.fixture
def pool_dir() -> Iterator[Path]:
    with temporary_pool_dir() as path:
        yield path


@pytest.fixture
def tokens(seed: int) -> list[int]:
    return prompt(random.Random(f"images-{seed}"), TEXT_TOKENS, first=3, last=tiny_models.IMAGE_TOKEN - 1)


def with_image(tokens: list[int], seed: int, **more: Any) -> dict[str, Any]:
    import numpy as np
    from PIL import Image

    side = tiny_models.IMAGE_PIXELS
    pixels = np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)
    return {"prompt_token_ids": list(tokens), "multi_modal_data": {"image": Image.fromarray(pixels)}, **more}


def two_images(engine: Engine, tokens: list[int]) -> dict[str, Any]:
    """The whole way of one image, and what another one in the same place finds of it."""
    first = reuse.three_answers(engine, with_image(tokens, 1))
    other, hit_tokens = reuse.from_us(engine, with_image(tokens, 2))
    plain = reuse.cold(engine, with_image(tokens, 2))
    return {"first": first, "other": other, "other hit": hit_tokens, "other cold": plain}


def one_image(engine: Engine, tokens: list[int]) -> dict[str, Any]:
    answer, hit_tokens = reuse.from_us(engine, with_image(tokens, 1))
    left_out = engine.settle().cellar("left_out_requests_total")
    cold = reuse.cold(engine, with_image(tokens, 1))
    return {"answer": answer, "hit": hit_tokens, "cold": cold, "left out": left_out}


def run(work_dir: Path, pool_dir: Path, name: str, function: Any, tokens: list[int], **options: Any) -> Any:
    with start_engine(work_dir, pool_dir, name=name, **{"cellar": CELLAR, **OPTIONS, **options}) as engine:
        engine.wait_ready()
        return engine.call(function, tokens)


def test_a_hit_with_an_image_is_identical_and_never_another_images_or_preparations(
    blip: Path, tmp_path: Path, pool_dir: Path, tokens: list[int]
) -> None:
    found = run(tmp_path, pool_dir, "first", two_images, tokens, model=blip)
    first = found["first"]
    assert (first.cold.cached_tokens, first.local.cached_tokens, first.hit_tokens) == (0, HIT_TOKENS, HIT_TOKENS)
    assert_identical(first.local, first.ours, "an image in the prefix")
    assert found["other hit"] == 0, "another image"
    assert_identical(found["other cold"], found["other"], "another image")
    assert differences(found["other"], first.cold) > 0, "the image shows nowhere: this test proves nothing"

    restarted = run(tmp_path, pool_dir, "restarted", one_image, tokens, model=blip)
    assert restarted["hit"] == HIT_TOKENS
    assert_identical(first.local, restarted["answer"], "after a restart")

    kwargs = {"mm_processor_kwargs": {"do_normalize": False}}
    otherwise = run(tmp_path, pool_dir, "otherwise", one_image, tokens, model=blip, **kwargs)
    assert otherwise["hit"] == 0
    assert_identical(otherwise["cold"], otherwise["answer"], "prepared otherwise")
    assert differences(otherwise["answer"], first.cold) > 0, "the preparation shows nowhere: this test proves nothing"


def test_images_that_are_named_by_a_counter_are_left_out(
    blip: Path, tmp_path: Path, pool_dir: Path, tokens: list[int]
) -> None:
    """vLLM does not hash media where neither cache needs it: number 1 of the next start is another image."""
    cellar = {**CELLAR, "without_prefix_caching": True}
    options = {"cellar": cellar, "model": blip, "enable_prefix_caching": False, "mm_processor_cache_gb": 0}
    found = run(tmp_path, pool_dir, "counted", one_image, tokens, **options)
    again = run(tmp_path, pool_dir, "again", one_image, tokens, **options)
    for one in (found, again):
        assert (one["hit"], one["left out"]) == (0, 1)
        assert_identical(one["cold"], one["answer"], "left out")
