"""Another connector loads beside ours, and something goes wrong: nothing that we keep may hold its bytes.

Seen on older code: a prompt whose load by the other was aborted or failed was kept as if it had been loaded, and blocks
that vLLM gave to the other while we still copied them were kept with what the other wrote.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.deadlines import deadline
from tests.vllm import beside, slow_copies, tiny_models
from tests.vllm.engine_process import EngineProcess, start_engine
from tests.vllm.engines import Engine
from tests.vllm.places import temporary_pool_dir
from tests.vllm.server import BLOCK_TOKENS, transfer_config

# 200 over both orders.
ROUNDS = {
    "aborted_while_the_other_loads": 25,
    "failed_beside_steps": 20,
    "failed_within_a_step": 20,
    "loaded_into_blocks_that_we_still_copy": 25,
    "loaded_late_and_rightly": 10,
}
assert ROUNDS.keys() == beside.SCENARIOS.keys()
assert 2 * sum(ROUNDS.values()) == 200
# Scenarios in which the prompt that is asked again is one that we computed: we must have kept it.
KEPT = ("loaded_into_blocks_that_we_still_copy",)
STAND_IN: dict[str, Any] = {
    "kv_connector": "StandInConnector",
    "kv_role": "kv_both",
    "kv_connector_module_path": "tests.vllm.stand_in",
}
pytestmark = pytest.mark.timeout(deadline(1200))


# What each of the two fixes is for, and what is there without it.
WITHOUT_A_FIX = {
    "KeepsForeignBlocksConnector": ("aborted_while_the_other_loads", "failed_beside_steps"),
    "UnfencedForeignBlocksConnector": ("loaded_into_blocks_that_we_still_copy",),
}
ROUNDS_WITHOUT_A_FIX = 10


@contextmanager
def open_beside(work_dir: Path, *, ours: str = "", ours_first: bool = True) -> Iterator[EngineProcess]:
    """A small engine with a KV cache that one long prompt fills, and copies that can be slowed down.

    Args:
        work_dir: for its model and logs.
        ours: one of tests.vllm.mutants in our place.
        ours_first: our place among the connectors.
    """
    model = tiny_models.llama(work_dir / "llama")
    with temporary_pool_dir() as pool_dir:
        settings = {"pool_dir": str(pool_dir), "trace_file": str(work_dir / "engine.trace.jsonl")}
        mine = transfer_config({**settings, "dram_size": "64MiB"})
        if ours:
            mine = {**mine, "kv_connector": ours, "kv_connector_module_path": "tests.vllm.mutants"}
        options: dict[str, Any] = {
            "model": model,
            "skip_tokenizer_init": True,
            "dtype": "float32",
            "max_num_batched_tokens": 1024,
            "max_model_len": (beside.KV_BLOCKS - 1) * BLOCK_TOKENS,
            "num_gpu_blocks_override": beside.KV_BLOCKS,
            "transfer": {
                "kv_connector": "MultiConnector",
                "kv_connector_extra_config": {"connectors": [mine, STAND_IN] if ours_first else [STAND_IN, mine]},
            },
        }
        env = slow_copies.make(work_dir)
        with start_engine(work_dir, pool_dir, env=env, cellar={}, **options) as engine:
            engine.wait_ready()
            engine.call(Engine.wait_in_service)
            yield engine


@pytest.fixture(scope="module", params=["ours_first", "other_first"])
def engine(
    request: pytest.FixtureRequest, vllm_installed: None, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[EngineProcess]:
    with open_beside(tmp_path_factory.mktemp("beside"), ours_first=request.param == "ours_first") as engine:
        yield engine


@pytest.mark.parametrize("scenario", list(beside.SCENARIOS))
def test_nothing_that_we_keep_holds_bytes_of_the_other(engine: EngineProcess, scenario: str, seed: int) -> None:
    seen = engine.call(beside.rounds, scenario, seed, ROUNDS[scenario])
    wrong = [it.what for it in seen if not it.right]
    met, kept = sum(it.proves for it in seen), sum(it.hit_tokens > 0 for it in seen)
    print(f"{scenario}: {len(wrong)} of {len(seen)} wrong, {met} met the moment, {kept} came from us, seed {seed}")
    assert not wrong, f"{len(wrong)} of {len(seen)} rounds: {wrong}"
    assert met == len(seen), "the dangerous moment was not met"
    if scenario in KEPT:
        assert kept > len(seen) // 2, "hardly anything was kept: nothing was shown"
    assert not engine.call(beside.leftovers)


@pytest.mark.parametrize("mutant", list(WITHOUT_A_FIX))
def test_without_either_fix_wrong_bytes_are_kept(vllm_installed: None, tmp_path: Path, seed: int, mutant: str) -> None:
    with open_beside(tmp_path, ours=mutant) as engine:
        for scenario in WITHOUT_A_FIX[mutant]:
            seen = engine.call(beside.rounds, scenario, seed, ROUNDS_WITHOUT_A_FIX)
            wrong = sum(not it.right for it in seen)
            print(f"{mutant}, {scenario}: {wrong} of {len(seen)} wrong")
            assert wrong > 0, f"{scenario} cannot fail"
