"""KV Cellar: keeps vLLM's KV cache beyond GPU memory.

Importing this package is light: no torch, no vLLM, no threads. vLLM calls :func:`register` in every process through the
entry point group ``vllm.general_plugins``; it makes the connector known by its name.
"""

from kvcellar._native import (
    BusyError,
    ConfigError,
    DataLostError,
    DeviceError,
    InternalError,
    KvcellarError,
    SystemRefusedError,
    UnsupportedError,
    __version__,
)

__all__ = [
    "BusyError",
    "ConfigError",
    "DataLostError",
    "DeviceError",
    "InternalError",
    "KvcellarError",
    "SystemRefusedError",
    "UnsupportedError",
    "__version__",
    "register",
]

CONNECTOR_NAME = "KVCellarConnector"


def register() -> None:
    """Make ``KVCellarConnector`` known to vLLM, and have its settings checked before a model is loaded.

    Called by vLLM's plugin loader, in every process, any number of times.
    """
    from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory

    from kvcellar.startup import check_with_vllm

    check_with_vllm()

    if CONNECTOR_NAME not in KVConnectorFactory._registry:
        KVConnectorFactory.register_connector(CONNECTOR_NAME, "kvcellar.connector", CONNECTOR_NAME)
