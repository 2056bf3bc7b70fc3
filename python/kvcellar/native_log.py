"""Brings the native side's log lines to vLLM's logger, with their levels."""

import os
import threading

from vllm.logger import init_logger

from kvcellar._native import next_log_line

logger = init_logger(f"vllm.{__name__}")

_PATIENCE_S = 3600.0
_lock = threading.Lock()
_started_in = 0


def start() -> None:
    """Have a thread of this process wait for lines. Calls after the first do nothing."""
    global _started_in  # noqa: PLW0603  (a fork leaves threads behind: one for each process)
    with _lock:
        if _started_in == os.getpid():
            return
        _started_in = os.getpid()
        threading.Thread(target=_follow, name="kvcellar-log", daemon=True).start()


def flush() -> None:
    """Log what waits now, before the process may end."""
    while (line := next_log_line(0.0)) is not None:
        _log(line)


def _follow() -> None:
    while True:
        if (line := next_log_line(_PATIENCE_S)) is not None:
            _log(line)


def _log(line: tuple[int, str]) -> None:
    level, text = line
    logger.log(level, "KV Cellar: %s", text)
