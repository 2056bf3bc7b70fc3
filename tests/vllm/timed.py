"""Our connector with a stopwatch around every scheduler-side call.

The time is CPU time of EngineCore's own thread, so that neither waiting nor another process's work on the same cores
counts. The sums lie in a small file that the bench reads while the engine runs; writing there is not timed.
"""

import functools
import mmap
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from kvcellar.connector import KVCellarConnector

from tests.vllm.sums import FILE_VARIABLE, LAYOUT

CALLS = (
    "on_new_request",
    "get_num_new_matched_tokens",
    "get_loaded_kv_cache_group_ids",
    "update_state_after_alloc",
    "get_external_cache_hit_sources",
    "build_connector_meta",
    "update_connector_output",
    "request_finished_all_groups",
    "get_kv_connector_stats",
    "take_events",
    "has_pending_push_work",
    "has_pending_block_frees",
)


class _Stopwatch:
    """Sums in shared memory."""

    def __init__(self, path: Path) -> None:
        path.write_bytes(bytes(LAYOUT.size))
        with path.open("r+b") as file:
            self._map = mmap.mmap(file.fileno(), LAYOUT.size)
        self._connector_ns = self._calls = self._steps = 0

    def add(self, spent_ns: int, *, step: bool) -> None:
        self._connector_ns += spent_ns
        self._calls += 1
        self._steps += step
        LAYOUT.pack_into(self._map, 0, self._connector_ns, self._calls, self._steps, time.process_time_ns())


def _timed(call: Callable[..., Any], watch: _Stopwatch, *, step: bool) -> Callable[..., Any]:
    @functools.wraps(call)
    def run(*arguments: Any, **named: Any) -> Any:
        begin = time.thread_time_ns()
        try:
            return call(*arguments, **named)
        finally:
            watch.add(time.thread_time_ns() - begin, step=step)

    return run


class TimedConnector(KVCellarConnector):
    """The real connector; on the scheduler's side each call is timed from outside."""

    def __init__(self, vllm_config: Any, role: Any, kv_cache_config: Any) -> None:
        """Wraps the calls of this instance when it is the scheduler's."""
        super().__init__(vllm_config, role, kv_cache_config)
        path = os.environ.get(FILE_VARIABLE)
        if path is None or role.name != "SCHEDULER":
            return
        watch = _Stopwatch(Path(path))
        for name in CALLS:
            if hasattr(self, name):
                setattr(self, name, _timed(getattr(self, name), watch, step=name == "build_connector_meta"))
