"""Beside another connector under MultiConnector; and the two ways to name ours."""

import random
from collections.abc import Iterator
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import pytest

from tests.vllm.answers import assert_identical
from tests.vllm.cache_model import Replay
from tests.vllm.engines import Engine, open_engine
from tests.vllm.places import temporary_pool_dir
from tests.vllm.prompts import prompt
from tests.vllm.server import BLOCK_TOKENS, transfer_config
from tests.vllm.sizes import kv_mib

ANSWER_TOKENS = 8


@pytest.fixture(scope="module")
def engine(vllm_installed: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    """Ours first, then vLLM's ExampleConnector, which keeps whole prompts in files and loads them synchronously."""
    work_dir = tmp_path_factory.mktemp("multi")
    files = work_dir / "example"
    files.mkdir()
    with temporary_pool_dir() as pool_dir:
        trace_file = work_dir / "engine.trace.jsonl"
        ours = transfer_config(
            {
                "pool_dir": str(pool_dir),
                "trace_file": str(trace_file),
                "dram_size": kv_mib(128),
                "namespace_salt": "multi",
            }
        )
        example = {
            "kv_connector": "ExampleConnector",
            "kv_role": "kv_both",
            "kv_connector_extra_config": {"shared_storage_path": str(files)},
        }
        both = {"kv_connector": "MultiConnector", "kv_connector_extra_config": {"connectors": [ours, example]}}
        options: dict[str, Any] = {
            "disable_hybrid_kv_cache_manager": True,
            "max_num_batched_tokens": 1024,
            "transfer": both,
        }
        with open_engine(work_dir, pool_dir, cellar={}, **options) as engine:
            engine.wait_in_service()
            yield engine


def stored_by_example(engine: Engine) -> int:
    return len(list((engine.trace_file.parent / "example").iterdir()))


def test_our_hits_are_right_beside_another_connector(engine: Engine, seed: int) -> None:
    rng = random.Random(f"multi-{seed}")
    # The other connector breaks on prompts that end one token after a block.
    prompts = [prompt(rng, length) for length in (96, 130, 200, 321 + 5)]
    engine.reset_gpu_cache()
    references = []
    for tokens in prompts:
        engine.complete(tokens, ANSWER_TOKENS)
        references.append(engine.complete(tokens, ANSWER_TOKENS))
    assert stored_by_example(engine) > 0, "the other connector stored nothing"
    for tokens, reference in zip(prompts, references, strict=True):
        before = engine.settle()
        engine.reset_gpu_cache()
        answer = engine.complete(tokens, ANSWER_TOKENS)
        hit = engine.settle().hit_tokens - before.hit_tokens
        assert hit == (len(tokens) - 1) // BLOCK_TOKENS * BLOCK_TOKENS, "not ours"
        assert_identical(reference, answer, f"{len(tokens)} tokens, seed {seed}")
    Replay(BLOCK_TOKENS).run(engine.trace())


def test_a_load_by_the_other_connector_is_none_of_ours(engine: Engine, seed: int) -> None:
    tokens = prompt(random.Random(f"other-{seed}"), 200)
    engine.complete(tokens, ANSWER_TOKENS)
    before = engine.settle()
    engine.reset_gpu_cache()
    answer = engine.complete(tokens, ANSWER_TOKENS, controls={"load": False})
    after = engine.settle()
    assert answer.cached_tokens > 0, "the other connector loaded nothing"
    assert after.hit_tokens == before.hit_tokens
    assert not after.leftovers()
    assert after.cellar("load_failures_total") == 0


def test_the_plugin_entry_point_registers_the_name(vllm_installed: None) -> None:
    from vllm.config.kv_transfer import KVTransferConfig
    from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory
    from vllm.plugins import load_general_plugins

    (plugin,) = entry_points(group="vllm.general_plugins", name="kvcellar")
    load_general_plugins()  # type: ignore[no-untyped-call]
    # Front end, EngineCore and workers all load plugins, and may do so twice.
    plugin.load()()
    by_name = KVConnectorFactory.get_connector_class(
        KVTransferConfig(kv_connector="KVCellarConnector", kv_role="kv_both")
    )
    by_path = KVConnectorFactory.get_connector_class(
        KVTransferConfig(
            kv_connector="KVCellarConnector", kv_role="kv_both", kv_connector_module_path="kvcellar.connector"
        )
    )
    assert by_name is by_path


def test_the_module_path_serves_without_the_plugin(vllm_installed: None, tmp_path: Path, seed: int) -> None:
    """Plugins off: only the module path can find the connector."""
    tokens = prompt(random.Random(f"path-{seed}"), 100)
    by_path = {"kv_connector_module_path": "kvcellar.connector"}
    with temporary_pool_dir() as pool_dir:
        cellar = {"dram_size": kv_mib(64), "namespace_salt": "path"}
        with open_engine(tmp_path, pool_dir, cellar=cellar, transfer=by_path, env={"VLLM_PLUGINS": ""}) as engine:
            engine.complete(tokens, 2)
            engine.settle()
            engine.reset_gpu_cache()
            assert engine.complete(tokens, 2).cached_tokens == 96
