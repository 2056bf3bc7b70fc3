"""What a second start finds: everything of the same model, nothing of one whose KV would be another."""

import json
import os
import random
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.vllm import tiny_models
from tests.vllm.answers import Answer, assert_identical, differences
from tests.vllm.engines import open_engine
from tests.vllm.places import pool_files, temporary_pool_dir
from tests.vllm.prompts import prompt
from tests.vllm.server import BLOCK_TOKENS, open_server

ANSWER_TOKENS = 4
PROMPT_TOKENS = 6 * BLOCK_TOKENS + 5
HIT_TOKENS = 6 * BLOCK_TOKENS
# Room for the pools of two lives: each start takes half of it.
CELLAR = {"dram_size": "128MiB", "local_engines": 2, "verify_loads": True}
TINY = {"skip_tokenizer_init": True, "max_num_batched_tokens": 1024, "kv_cache_memory_bytes": 1 << 27}

pytestmark = [pytest.mark.usefixtures("vllm_installed"), pytest.mark.e2e]


@pytest.fixture(scope="module")
def tokens(seed: int) -> list[int]:
    return [token % tiny_models.VOCABULARY for token in prompt(random.Random(seed), PROMPT_TOKENS)]


@pytest.fixture(scope="module")
def llama(vllm_installed: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.llama(tmp_path_factory.mktemp("restarts") / "llama")


@pytest.fixture
def pool_dir() -> Iterator[Path]:
    with temporary_pool_dir() as path:
        yield path


def answer(
    work_dir: Path, pool_dir: Path, tokens: list[int], name: str, *, ours: bool = True, **options: Any
) -> Answer:
    """One start and one request; what was computed is in the pool when it ends."""
    with open_engine(work_dir, pool_dir, cellar=CELLAR if ours else None, name=name, **{**TINY, **options}) as engine:
        found = engine.complete(tokens, ANSWER_TOKENS)
        if ours:
            engine.settle()
        return found


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_model_that_was_downloaded_again_keeps_its_cache_whatever_else_is_set_that_does_not_matter(
    llama: Path, tmp_path: Path, pool_dir: Path, tokens: list[int], ranks: int
) -> None:
    """Another folder, new time stamps, other sizes, names and logs; in processes whose string hashes differ."""
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < ranks:
        pytest.skip(f"{ranks} ranks need {ranks} cores, this process may use {len(cores)}")
    env = {"VLLM_CPU_OMP_THREADS_BIND": "|".join(str(core) for core in cores[:ranks])}
    own = {"tensor_parallel_size": ranks, "env": env}
    first = answer(tmp_path, pool_dir, tokens, "first", model=llama, **own)
    fresh = tmp_path / "another" / "folder"
    shutil.copytree(llama, fresh, copy_function=shutil.copy)
    time.sleep(tiny_models.SETTLE_S)
    others = {
        "served_model_name": ["renamed"],
        "max_num_seqs": 3,
        "kv_cache_memory_bytes": 1 << 26,
        "max_num_batched_tokens": 512,
        "seed": 9,
        "env": {**env, "VLLM_LOGGING_LEVEL": "INFO"},
    }
    second = answer(tmp_path, pool_dir, tokens, "second", model=fresh, **{**own, **others})
    assert len(pool_files(pool_dir)) == 1, [json.loads(_facts(path)) for path in pool_files(pool_dir)]
    assert (first.cached_tokens, second.cached_tokens) == (0, HIT_TOKENS)
    assert second.tokens == first.tokens


def _facts(pool: Path) -> str:
    """The facts in a pool's header, to see which part differs."""
    head = pool.read_bytes()[: 64 << 10]
    begin = head.index(b'{"')
    return head[begin : head.index(b"\0", begin)].decode()


def test_two_servers_of_one_command_on_other_ports_share_a_namespace(
    tmp_path: Path, pool_dir: Path, tokens: list[int]
) -> None:
    cached = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        with open_server(tmp_path / name, pool_dir, cellar=CELLAR) as server:
            cached.append(server.complete(tokens, ANSWER_TOKENS).cached_tokens)
            server.settle()
    assert len(pool_files(pool_dir)) == 1, [json.loads(_facts(path)) for path in pool_files(pool_dir)]
    assert cached == [0, HIT_TOKENS]


def test_other_weights_in_the_same_folder_find_nothing(
    llama: Path, tmp_path: Path, pool_dir: Path, tokens: list[int]
) -> None:
    """Same names and sizes, time stamps put back: only what the tensors hold has changed."""
    import torch
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "model"
    shutil.copytree(llama, folder)
    time.sleep(tiny_models.SETTLE_S)
    first = answer(tmp_path, pool_dir, tokens, "first", model=folder)
    path = folder / "model.safetensors"
    times, tensors = path.stat(), load_file(path)
    changed = next(name for name in sorted(tensors) if "k_proj" in name)
    tensors[changed] = (tensors[changed].to(torch.float32) * -3).to(tensors[changed].dtype)
    save_file(tensors, path, {"format": "pt"})
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    time.sleep(tiny_models.SETTLE_S)
    cold = answer(tmp_path, pool_dir, tokens, "cold", ours=False, model=folder)
    second = answer(tmp_path, pool_dir, tokens, "second", model=folder)
    assert second.cached_tokens == 0
    assert_identical(cold, second, "after other weights")
    assert differences(first, second) > 0, "the change of weights shows nowhere: this test proves nothing"


def test_a_long_rope_model_started_for_short_prompts_finds_nothing_of_its_long_life(
    vllm_installed: None, tmp_path: Path, pool_dir: Path, tokens: list[int]
) -> None:
    """vLLM chooses the factors of all positions by max_model_len: K of one start is wrong for the other."""
    model = tiny_models.long_rope(tmp_path / "phi")
    short = {"model": model, "max_model_len": tiny_models.SHORT_TOKENS}
    long = {"model": model, "max_model_len": 4 * tiny_models.SHORT_TOKENS}
    first = answer(tmp_path, pool_dir, tokens, "long", **long)
    cold = answer(tmp_path, pool_dir, tokens, "cold", ours=False, **short)
    second = answer(tmp_path, pool_dir, tokens, "short", **short)
    assert second.cached_tokens == 0
    assert_identical(cold, second, "short after long")
    assert differences(first, second) > 0, "the factors show nowhere: this test proves nothing"
    again = answer(tmp_path, pool_dir, tokens, "long-again", **long)
    assert again.cached_tokens == HIT_TOKENS, "its own blocks are still there"
