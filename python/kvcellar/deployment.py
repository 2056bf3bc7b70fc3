"""How this engine is deployed: beside which other connectors, and with how many engines on the same machine."""

import os
import sys
from typing import Any

from vllm.config import VllmConfig

from kvcellar._native import Config

MULTI_CONNECTOR = "MultiConnector"
# Set in the front end, where vLLM still knows how many engines it will start; inherited by these.
ENGINES_VARIABLE = "KVCELLAR_LOCAL_ENGINES"
_FRAMES_MAX = 12


def outer_transfer_config() -> Any | None:
    """vLLM's own ``kv_transfer_config`` while MultiConnector is making its connectors; None where we are alone.

    MultiConnector hands each of its connectors a configuration that looks as if it were alone. Only the callers' frames
    tell: one of them is MultiConnector's own, with the real configuration.
    """
    frame = sys._getframe(1)
    for _ in range(_FRAMES_MAX):
        transfer = getattr(frame.f_locals.get("vllm_config"), "kv_transfer_config", None)
        if getattr(transfer, "kv_connector", None) == MULTI_CONNECTOR:
            return transfer
        if frame.f_back is None:
            break
        frame = frame.f_back
    return None


def engines_started_by(vllm_config: VllmConfig) -> int:
    """How many engines a front end with this configuration starts on this machine.

    With an external load balancer each data-parallel rank has a front end of its own, and nothing says which of them
    run here: all of them are counted.
    """
    parallel = vllm_config.parallel_config
    if getattr(parallel, "data_parallel_external_lb", False):
        return max(1, int(parallel.data_parallel_size))
    return max(1, int(parallel.data_parallel_size_local))


def local_engines(vllm_config: VllmConfig, config: Config) -> int:
    """How many engines share ``dram_size`` and ``nvme_size``.

    vLLM makes independent engines of the data-parallel ranks of a dense model before their schedulers exist, so their
    own configuration says 1.
    """
    if config.local_engines is not None:
        return config.local_engines
    told = os.environ.get(ENGINES_VARIABLE, "")
    return max(engines_started_by(vllm_config), int(told) if told.isdecimal() else 1)
