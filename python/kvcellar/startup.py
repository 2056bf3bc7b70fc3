"""Mistakes in our settings are told where vLLM puts its configuration together: before any model is loaded.

A connector is made after the weights were loaded, in a process of its own, whose error reaches the user as a stack
trace among hundreds of lines. vLLM has no hook for connectors at the earlier moment, so its configuration's own last
step is followed by ours.
"""

import functools
import json
import multiprocessing
import os
from collections.abc import Iterator, Mapping
from typing import Any

_MARK = "__kvcellar__"
_told: set[str] = set()


def check_with_vllm() -> None:
    """Have every `VllmConfig` checked once vLLM has completed it. Any number of calls do it once."""
    from vllm.config import VllmConfig

    complete = VllmConfig.__post_init__
    if getattr(complete, _MARK, False):
        return

    @functools.wraps(complete)
    def complete_and_check(self: Any, *arguments: Any, **named: Any) -> None:
        complete(self, *arguments, **named)
        check(self)

    setattr(complete_and_check, _MARK, True)
    VllmConfig.__post_init__ = complete_and_check


def our_settings(transfer: Any) -> Iterator[Mapping[str, Any]]:
    """The ``kv_connector_extra_config`` of each connector of ours in a ``kv_transfer_config``."""
    from kvcellar import CONNECTOR_NAME
    from kvcellar.deployment import MULTI_CONNECTOR

    if transfer is None:
        return
    extra = transfer.kv_connector_extra_config or {}
    if transfer.kv_connector == CONNECTOR_NAME:
        yield extra
    elif transfer.kv_connector == MULTI_CONNECTOR:
        for one in extra.get("connectors") or ():
            if isinstance(one, Mapping) and one.get("kv_connector") == CONNECTOR_NAME:
                yield one.get("kv_connector_extra_config") or {}


def check(vllm_config: Any) -> None:
    """Check what can be known of our settings before a model is loaded.

    Raises:
        ConfigError: a setting that cannot work, named, with what to write instead.
        UnsupportedError: a vLLM version or mode that cannot be served.
    """
    for settings in our_settings(getattr(vllm_config, "kv_transfer_config", None)):
        from vllm.logger import init_logger

        from kvcellar import window
        from kvcellar._native import Config
        from kvcellar.deployment import ENGINES_VARIABLE, engines_started_by
        from kvcellar.eligibility import refuse_sleep_mode
        from kvcellar.facts import remember_models

        window.check(window.vllm_version())
        config = Config.parse(json.dumps(settings))
        refuse_sleep_mode(vllm_config)
        for warning in config.check_machine():
            if warning not in _told:
                _told.add(warning)
                init_logger(f"vllm.{__name__}").warning("KV Cellar: %s", warning)
        remember_models(vllm_config)
        engines = engines_started_by(vllm_config)
        if engines > 1:
            os.environ[ENGINES_VARIABLE] = str(engines)
        elif multiprocessing.parent_process() is None:
            # A front end that started several engines before. An engine's own process must keep
            # what it was told: there vLLM says 1.
            os.environ.pop(ENGINES_VARIABLE, None)
