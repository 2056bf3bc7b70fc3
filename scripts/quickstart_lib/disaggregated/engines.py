"""The prefill and the decode engine: NIXL hands blocks over, and KV Cellar keeps them in both."""

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

from quickstart_lib.arguments import MODEL
from quickstart_lib.cache_size import CacheSize
from quickstart_lib.client import Client
from quickstart_lib.disaggregated.arguments import LOG_STEM
from quickstart_lib.failure import QuickstartError
from quickstart_lib.server import MODEL_NAME, Server, command, connector_flag, core_shares, free_port

ROLES = {"prefill": "kv_producer", "decode": "kv_consumer"}
PROBE_SECONDS_MAX = 120.0
PROBE = "from nixl._api import nixl_agent, nixl_agent_config as c; nixl_agent('probe', c(backends=['UCX']))"


@dataclass(frozen=True)
class Pair:
    """Clients of both engines."""

    prefill: Client
    decode: Client


def check_nixl() -> None:
    """Ask NIXL, in a process of its own, whether it runs here.

    Raises:
        QuickstartError: it does not; with its own words.
    """
    command_line = [sys.executable, "-c", PROBE]
    asked = subprocess.run(command_line, capture_output=True, text=True, timeout=PROBE_SECONDS_MAX, check=False)
    if asked.returncode != 0:
        words = asked.stderr.strip().splitlines()[-1:] or [f"exit status {asked.returncode}"]
        raise QuickstartError(f"NIXL, which hands KV from engine to engine, does not run here: {words[0]}")


def transfer(role: str, **settings: object) -> str:
    """`--kv-transfer-config` of an engine: NIXL first, so that it answers for what was computed elsewhere."""
    nixl = {"kv_connector": "NixlConnector", "kv_role": ROLES[role], "kv_buffer_device": "cpu"}
    connectors = [nixl, json.loads(connector_flag(**settings))]
    return json.dumps(
        {
            "kv_connector": "MultiConnector",
            "kv_role": ROLES[role],
            "kv_load_failure_policy": "recompute",
            "kv_connector_extra_config": {"connectors": connectors},
        }
    )


@contextmanager
def open_pair(size: CacheSize, dram_size: str, work_dir: Path, on_wait: Callable[[float], None]) -> Iterator[Pair]:
    """Inside, both engines answer; afterwards, their process groups are gone.

    Raises:
        QuickstartError: one of them could not start or failed; with the end of its log.
    """
    with ExitStack() as ends:
        servers, ports = [], []
        for role, cores in zip(ROLES, core_shares(len(ROLES)), strict=True):
            port, pool = free_port(), work_dir / role
            pool.mkdir()
            events = {"endpoint": f"ipc://{work_dir}/{role}.events"}
            line = command(MODEL, port, size, events, transfer(role, dram_size=dram_size, pool_dir=str(pool)))
            environment = {
                "VLLM_CPU_OMP_THREADS_BIND": cores,
                "VLLM_NIXL_SIDE_CHANNEL_HOST": "127.0.0.1",
                "VLLM_NIXL_SIDE_CHANNEL_PORT": str(free_port()),
                # Nothing but this machine's memory and loopback.
                "UCX_TLS": "tcp,sm,self",
                "UCX_NET_DEVICES": "lo",
            }
            log = LOG_STEM.with_name(f"{LOG_STEM.name}-{role}.log")
            servers.append(Server(line, port, log, on_wait, name=f"the {role} engine", environment=environment))
            ports.append(port)
        for server in servers:
            # In this order: an engine that fails while it answers is named with the end of its log.
            ends.push(server.__exit__)
            server.start()
        for server in servers:
            server.wait_until_ready()
        yield Pair(*(ends.enter_context(closing(Client(port, MODEL_NAME))) for port in ports))
