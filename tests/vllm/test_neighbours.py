"""Beside connectors that ask for a KV cache layout, and beside one that exchanges a handshake.

Of the connectors named here some run on GPUs only; what their classes answer can be asked anywhere.
"""

import random
from itertools import permutations
from pathlib import Path
from typing import Any

import pytest

from tests.deadlines import deadline
from tests.vllm import tiny_models
from tests.vllm.engine_process import start_engine
from tests.vllm.engines import Engine
from tests.vllm.places import temporary_pool_dir
from tests.vllm.prompts import prompt
from tests.vllm.references import from_us
from tests.vllm.server import BLOCK_TOKENS, transfer_config

# Connectors that people put beside ours, and what they ask for on a GPU.
NEIGHBOURS = ("NixlConnector", "MooncakeConnector", "OffloadingConnector", "ExampleConnector")
LAYER_MAJOR = "LBHNC"


@pytest.fixture(scope="module")
def model(vllm_installed: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny Llama."""
    return tiny_models.llama(tmp_path_factory.mktemp("llama"))


@pytest.fixture
def gpu(vllm_installed: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM believes in a GPU where it asks its platform."""
    from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory
    from vllm.platforms import current_platform

    for name in NEIGHBOURS:
        # What these import looks for a real GPU's libraries once vLLM believes in one.
        KVConnectorFactory.get_connector_class_by_name(name)
    monkeypatch.setattr(type(current_platform), "is_cuda", lambda self: True)


def config_of(model: Path, transfer: dict[str, Any]) -> Any:
    """vLLM's configuration with these connectors."""
    from vllm.config import KVTransferConfig, ModelConfig, VllmConfig
    from vllm.plugins import load_general_plugins

    load_general_plugins()  # type: ignore[no-untyped-call]
    return VllmConfig(
        model_config=ModelConfig(model=str(model), skip_tokenizer_init=True),
        kv_transfer_config=KVTransferConfig(**transfer),
    )


def child(name: str) -> dict[str, Any]:
    return {"kv_connector": name, "kv_role": "kv_both"}


def multi(children: list[dict[str, Any]]) -> dict[str, Any]:
    return {**child("MultiConnector"), "kv_connector_extra_config": {"connectors": children}}


def wished(config: Any) -> str | None:
    """What vLLM would ask the attention backends for."""
    from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory

    layout: str | None = KVConnectorFactory.get_connector_class(config.kv_transfer_config).get_required_kvcache_layout(
        config
    )
    return layout


def test_alone_ours_asks_for_blocks_that_lie_in_one_piece(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.platforms import current_platform

    config = config_of(model, transfer_config({}))
    assert wished(config) is None
    monkeypatch.setattr(type(current_platform), "is_cuda", lambda self: True)
    assert wished(config) == "BLHNC"


@pytest.mark.parametrize("neighbour", NEIGHBOURS)
@pytest.mark.parametrize("first", ["ours", "theirs"])
def test_beside_another_the_layout_is_the_others(model: Path, gpu: None, neighbour: str, first: str) -> None:
    config = config_of(model, child(neighbour))
    alone = wished(config)
    children = [transfer_config({}), child(neighbour)]
    if first == "theirs":
        children.reverse()
    assert wished(config_of(model, multi(children))) == alone
    assert alone == (LAYER_MAJOR if neighbour != "ExampleConnector" else None)


def test_between_any_two_others_the_layout_is_theirs(model: Path, gpu: None) -> None:
    for two in permutations(NEIGHBOURS, 2):
        children = [child(two[0]), transfer_config({}), child(two[1])]
        assert wished(config_of(model, multi(children))) == LAYER_MAJOR, two


def shaken(_engine: Engine) -> list[tuple[int, int]]:
    """Asked in the engine's process: ranks whose payload came through."""
    from tests.vllm.stand_in import desk

    return desk.shaken


@pytest.mark.timeout(deadline(900))
@pytest.mark.parametrize("first", ["ours", "theirs"])
def test_beside_a_handshake_both_know_their_ranks(model: Path, tmp_path: Path, first: str, seed: int) -> None:
    """vLLM carries one payload a rank, and a connector that gets another's refuses to start."""
    other = {
        **child("StandInConnector"),
        "kv_connector_module_path": "tests.vllm.stand_in",
        "kv_connector_extra_config": {"handshake": True},
    }
    tokens = prompt(random.Random(f"handshake-{seed}"), 5 * BLOCK_TOKENS + 7, 0, tiny_models.VOCABULARY - 1)
    with temporary_pool_dir() as pool_dir:
        trace_file = tmp_path / "engine.trace.jsonl"
        ours = transfer_config({"pool_dir": str(pool_dir), "trace_file": str(trace_file), "dram_size": "64MiB"})
        children = [ours, other] if first == "ours" else [other, ours]
        options: dict[str, Any] = {"model": model, "skip_tokenizer_init": True, "dtype": "float32"}
        transfer = multi(children)
        with start_engine(tmp_path, pool_dir, cellar={}, transfer=transfer, **options) as engine:
            engine.wait_ready()
            assert engine.call(shaken) == [(0, 0)]
            engine.call(Engine.wait_in_service)
            engine.call(Engine.complete, tokens, 1)
            hit, right = engine.call(from_us, tokens, 2)
            assert right, f"{hit} tokens hit, seed {seed}"
            assert hit == 5 * BLOCK_TOKENS, "nothing was kept"
