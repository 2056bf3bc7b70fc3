"""What vLLM asks each connector's class, and all of them together, before a model is loaded: KV cache layouts.

The connectors named here run on GPUs only; what their classes answer can be asked anywhere.
"""

from itertools import permutations
from pathlib import Path
from typing import Any

import pytest

from tests.vllm import tiny_models
from tests.vllm.server import transfer_config

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
    from vllm.platforms import current_platform

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
