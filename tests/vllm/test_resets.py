"""A reset that vLLM refuses for itself, an end while a pool is being made, and what is kept after the tiers retired."""

import gc
import random
import threading
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.vllm import tiny_models
from tests.vllm.engine_process import start_engine
from tests.vllm.engines import Engine
from tests.vllm.places import temporary_pool_dir
from tests.vllm.prompts import prompt
from tests.vllm.reuse import TINY
from tests.vllm.server import BLOCK_TOKENS, transfer_config

# vLLM's CPU build ends with SIGILL in bfloat16 where AMX was not used before in its process.
FLOAT: dict[str, Any] = {**TINY, "dtype": "float32"}
pytestmark = pytest.mark.usefixtures("vllm_installed")


@pytest.fixture(scope="module")
def llama(vllm_installed: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.llama(tmp_path_factory.mktemp("resets") / "llama")


@pytest.fixture
def pool_dir() -> Iterator[Path]:
    with temporary_pool_dir() as path:
        yield path


def tokens_of(seed: int) -> list[int]:
    return prompt(random.Random(f"resets-{seed}"), 5 * BLOCK_TOKENS + 3, 0, tiny_models.VOCABULARY - 1)


def stored(engine: Engine) -> float:
    return engine.settle().cellar("stored_blocks_total")


def after_a_refused_reset(engine: Engine, tokens: list[int]) -> tuple[bool, int, float, float]:
    """Whether vLLM reset its own cache beside a request; what it hit after that; blocks stored then, and at last."""
    front_end = engine.llm.llm_engine
    front_end.add_request("runs", {"prompt_token_ids": tokens}, engine._sampling(6, None))
    while not any(output.outputs[0].token_ids for output in front_end.step()):
        pass
    was_reset = bool(engine.llm.reset_prefix_cache(reset_connector=True))
    while front_end.has_unfinished_requests():
        front_end.step()
    before = stored(engine)
    answer = engine.complete([*tokens, *tokens], 2)
    doubtful = stored(engine) - before
    engine.reset_all()
    before = stored(engine)
    engine.complete([*tokens, *tokens], 2)
    return was_reset, answer.cached_tokens, doubtful, stored(engine) - before


def test_what_vllm_keeps_of_before_a_reset_is_not_stored_again(
    llama: Path, tmp_path: Path, pool_dir: Path, seed: int
) -> None:
    """It refuses to clear its own cache beside a running request, and clears ours all the same."""
    with start_engine(tmp_path, pool_dir, cellar={"dram_size": "64MiB"}, model=llama, **FLOAT) as engine:
        engine.wait_ready()
        was_reset, hit, doubtful, at_last = engine.call(after_a_refused_reset, tokens_of(seed))
    assert not was_reset and hit > 0, "vLLM had nothing of before: this test proves nothing"
    assert doubtful == 0
    assert at_last > 0


def kept_after_retiring(engine: Engine, tokens: list[int]) -> tuple[int, int]:
    """How many requests came after the tiers retired, and how many of them something still holds."""
    from kvcellar.connector import KVCellarConnector

    scheduler: Any = engine.llm.llm_engine.engine_core.engine_core.scheduler
    (ours,) = (it for it in scheduler.connector._connectors if isinstance(it, KVCellarConnector))
    assert ours._scheduler is not None
    ours._scheduler.retire()
    seen: list[weakref.ref[Any]] = []
    add = scheduler.add_request

    def noted(request: Any) -> Any:
        seen.append(weakref.ref(request))
        return add(request)

    scheduler.add_request = noted
    for number in range(5):
        engine.complete([*tokens, number], 2)
    gc.collect()
    return len(seen), sum(request() is not None for request in seen)


def test_requests_after_the_tiers_retired_are_not_held_beside_others(
    llama: Path, tmp_path: Path, pool_dir: Path, seed: int
) -> None:
    children = [
        transfer_config(
            {"pool_dir": str(pool_dir), "dram_size": "64MiB", "trace_file": str(tmp_path / "engine.trace.jsonl")}
        ),
        {
            "kv_connector": "StandInConnector",
            "kv_role": "kv_both",
            "kv_connector_module_path": "tests.vllm.stand_in",
        },
    ]
    transfer = {"kv_connector": "MultiConnector", "kv_connector_extra_config": {"connectors": children}}
    with start_engine(tmp_path, pool_dir, cellar={}, model=llama, transfer=transfer, **FLOAT) as engine:
        engine.wait_ready()
        engine.call(Engine.wait_in_service)
        came, held = engine.call(kept_after_retiring, tokens_of(seed))
    # vLLM may still hold the last one itself.
    assert came == 5 and held <= 1


def test_a_pool_that_is_made_after_the_end_is_let_go(monkeypatch: pytest.MonkeyPatch) -> None:
    from kvcellar import scheduler

    class Native:
        open = False

        def ticket(self) -> str:
            return "{}"

        def close(self) -> None:
            self.open = False

    native = Native()
    side = object.__new__(scheduler.SchedulerSide)
    parts: dict[str, Any] = {"_engine": native, "_closing": threading.Lock(), "_front_end": None, "_watch": None}
    parts |= {"_vllm_config": None, "_kv_cache_config": None, "_offers": {}, "_engines": 1, "_closed": False}
    for name, value in (parts | {"_opened": False, "_ticket": None}).items():
        setattr(side, name, value)

    def end_comes_first(engine: Native, *_: Any) -> None:
        side.shutdown()
        engine.open = True

    monkeypatch.setattr("kvcellar.opening.open_pool", end_comes_first)
    side._open()
    assert not native.open and not side._opened
