"""NIXL on this machine: whether it runs, and a prefill and a decode engine that hand KV over with it on loopback."""

import contextlib
import functools
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.vllm.answers import Answer
from tests.vllm.engine_process import EngineProcess, start_engine
from tests.vllm.engines import Engine
from tests.vllm.server import free_port

ROLES = {"prefill": "kv_producer", "decode": "kv_consumer"}
PROBE = "from nixl._api import nixl_agent, nixl_agent_config as c; nixl_agent('probe', c(backends=['UCX']))"
PROBE_DEADLINE_S = 120.0

# What a router in front of disaggregated engines asks the prefill engine for.
DECODE_ELSEWHERE: dict[str, object] = {
    "do_remote_decode": True,
    "do_remote_prefill": False,
    "remote_engine_id": None,
    "remote_block_ids": None,
    "remote_host": None,
    "remote_port": None,
}


@functools.cache
def why_not() -> str | None:
    """Why NIXL cannot run here; nothing where it can. Asked in another process, which it may end."""
    command = [sys.executable, "-c", PROBE]
    asked = subprocess.run(command, capture_output=True, text=True, timeout=PROBE_DEADLINE_S, check=False)
    if asked.returncode == 0:
        return None
    return next(iter(asked.stderr.strip().splitlines()[-1:]), f"exit status {asked.returncode}")


def connector(role: str) -> dict[str, Any]:
    """vLLM's `kv_transfer_config` for NIXL over host memory, as `prefill` or `decode`."""
    return {"kv_connector": "NixlConnector", "kv_role": ROLES[role], "kv_buffer_device": "cpu"}


def beside(role: str, connectors: list[dict[str, Any]], **more: object) -> dict[str, Any]:
    """`MultiConnector` over these, in this order."""
    children = {"kv_connector_extra_config": {"connectors": connectors}}
    return {"kv_connector": "MultiConnector", "kv_role": ROLES[role], **children, **more}


@dataclass(frozen=True)
class Pair:
    """Two engines."""

    prefill: EngineProcess
    decode: EngineProcess

    def hand_over(self, tokens: list[int]) -> dict[str, Any]:
        """Computes a prompt in the prefill engine, and returns what the decode engine needs to fetch it."""
        _, params = self.prefill.call(Engine.transfer, tokens, 1, DECODE_ELSEWHERE)
        assert params is not None, "the prefill engine handed nothing over"
        assert params["remote_block_ids"], "the prefill engine handed no block over"
        return params

    def complete(self, tokens: list[int], max_tokens: int) -> Answer:
        """One request on its way through both engines."""
        answer, _ = self.decode.call(Engine.transfer, tokens, max_tokens, self.hand_over(tokens))
        return answer


def _run_on(engine: Engine, cores: set[int]) -> None:
    os.sched_setaffinity(0, cores)


@contextlib.contextmanager
def open_pair(
    work_dir: Path, pool_dir: Path, transfers: Mapping[str, Mapping[str, Any]], **options: Any
) -> Iterator[Pair]:
    """Starts a prefill and a decode engine beside each other, and lets both use the same cores.

    Args:
        work_dir: where operation logs and the processes' output go.
        pool_dir: where pools go.
        transfers: the `kv_transfer_config` of `prefill` and of `decode`.
        options: more of `open_engine`, for both.

    """
    cores = os.sched_getaffinity(0)
    with contextlib.ExitStack() as stack:
        engines = {}
        for role, transfer in transfers.items():
            env = {
                "VLLM_NIXL_SIDE_CHANNEL_HOST": "127.0.0.1",
                "VLLM_NIXL_SIDE_CHANNEL_PORT": str(free_port()),
                # Nothing but this machine's memory and loopback.
                "UCX_TLS": "tcp,sm,self",
                "UCX_NET_DEVICES": "lo",
            }
            engine = start_engine(work_dir, pool_dir, env=env, name=role, cellar={}, transfer=transfer, **options)
            engines[role] = stack.enter_context(engine)
        for engine in engines.values():
            engine.wait_ready()
            # NIXL keeps the thread that computes to the machine's last core, in both engines.
            engine.call(_run_on, cores)
        yield Pair(**engines)
