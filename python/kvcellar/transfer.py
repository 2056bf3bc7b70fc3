"""What other connectors beside ours do to KV: their part of the namespace.

Ours changes no byte, whatever its sizes and directories are. Another one may (a lossy code, a block it computed
elsewhere), so its name and settings count, without what differs from start to start.
"""

from collections.abc import Mapping

from vllm.config import VllmConfig

from kvcellar import CONNECTOR_NAME
from kvcellar.canonical import Dump, Json

# Endings of names, in any connector's settings, that say where it talks and not what.
PLACES = ("engine_id", "_id", "_ip", "_host", "_port", "_addr", "_address", "_url", "_rank", "_dir", "_path")
_OURS = "kvcellar"


def others(vllm_config: VllmConfig, dump: Dump) -> Json:
    """The connectors of this engine that are not ours, as far as they may change KV."""
    transfer = vllm_config.kv_transfer_config
    if transfer is None:
        return []
    return _connectors(
        {
            "kv_connector": transfer.kv_connector,
            "kv_connector_module_path": transfer.kv_connector_module_path,
            "kv_connector_extra_config": transfer.kv_connector_extra_config,
            "enable_permute_local_kv": getattr(transfer, "enable_permute_local_kv", False),
        },
        dump,
    )


def _connectors(settings: Mapping[str, object], dump: Dump) -> list[Json]:
    if is_ours(settings):
        return []
    extra = settings.get("kv_connector_extra_config") or {}
    children = extra.get("connectors") if isinstance(extra, Mapping) else None
    if isinstance(children, list):
        return [found for child in children if isinstance(child, Mapping) for found in _connectors(child, dump)]
    return [dump.of(_without_places(settings), f"kv_transfer_config.{settings.get('kv_connector')}")]


def is_ours(settings: Mapping[str, object]) -> bool:
    """Whether these are settings of our own connector."""
    module = settings.get("kv_connector_module_path") or ""
    return settings.get("kv_connector") == CONNECTOR_NAME or str(module).partition(".")[0] == _OURS


def _without_places(settings: Mapping[str, object]) -> dict[str, object]:
    return {
        name: _without_places(item) if isinstance(item, Mapping) else item
        for name, item in settings.items()
        if not (name.endswith(PLACES) and name != "kv_connector_module_path")
    }
