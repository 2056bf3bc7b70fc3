"""The two vLLM engines, each with a share of the cores and with folders of its own."""

import http.client
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from types import TracebackType

from quickstart_lib.cache_size import NULL_BLOCKS, CacheSize
from quickstart_lib.client import Client
from quickstart_lib.failure import QuickstartError, ServerTroubleError
from quickstart_lib.fleet.arguments import LOG_STEM
from quickstart_lib.fleet.measurements import NAMES
from quickstart_lib.metrics import HIT_TOKENS, Metrics
from quickstart_lib.server import MODEL_NAME, Server, command, connector_flag, core_shares, free_port

DYING_SECONDS = 3.0


class Engines:
    """`with Engines(...)`: inside, both answer; afterwards, their process groups are gone.

    Their events go over sockets in `work_dir`: a TCP publisher of vLLM would listen on every interface.
    """

    def __init__(
        self, model: Path, size: CacheSize, dram_bytes: int, work_dir: Path, on_wait: Callable[[float], None]
    ) -> None:
        self._ends = ExitStack()
        self._servers: dict[str, Server] = {}
        self._ports: dict[str, int] = {}
        self.addresses: list[str] = []
        for name, cores in zip(NAMES, core_shares(len(NAMES)), strict=True):
            port, pool = free_port(), work_dir / name
            pool.mkdir()
            events = {
                "endpoint": f"ipc://{work_dir}/{name}.events",
                "replay_endpoint": f"ipc://{work_dir}/{name}.replay",
            }
            connector = connector_flag(dram_size=dram_bytes, pool_dir=str(pool))
            line = command(model, port, size, events, connector)
            self._servers[name] = Server(
                line,
                port,
                LOG_STEM.with_name(f"{LOG_STEM.name}-{name}.log"),
                on_wait,
                name=f"engine {name}",
                environment={"VLLM_CPU_OMP_THREADS_BIND": cores},
            )
            self._ports[name] = port
            spec = f"name={name},url=http://127.0.0.1:{port}"
            self.addresses.append(f"{spec},events={events['endpoint']},replay={events['replay_endpoint']}")

    def __enter__(self) -> "Engines":
        try:
            for server in self._servers.values():
                self._ends.callback(server.stop)
                server.start()
            for server in self._servers.values():
                server.wait_until_ready()
        except BaseException:
            self._ends.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        has_failed = isinstance(error, (OSError, QuickstartError))
        dead = self._dead(DYING_SECONDS if has_failed else 0.0)
        self._ends.close()
        if dead and has_failed:
            names = " and ".join(server.name for server in dead)
            raise QuickstartError(f"{names} ended while it was needed.\n{dead[0].tail()}") from error

    def warm_up(self, prompts: list[list[int]], output_tokens: int) -> None:
        """Unmeasured prompts: the first requests of a process pay for lazily made buffers."""
        for name in NAMES:
            with self._client(name) as client:
                for prompt in prompts:
                    client.complete(prompt, output_tokens)

    def empty(self) -> None:
        """Empty all caches, dram tiers too. An idle vLLM tells of that with its next step only: each gets one."""
        for name in NAMES:
            with self._client(name) as client:
                client.reset_prefix_cache(external=True)
                client.complete([1, 2, 3], 1)

    def kv_cache_tokens(self, block_tokens: int) -> int:
        """Tokens that each engine's KV cache holds, as the engines report it.

        Raises:
            QuickstartError: they do not say it, or differ.
        """
        blocks = {self._metrics(name).gpu_blocks() - NULL_BLOCKS for name in NAMES}
        if len(blocks) != 1:
            raise QuickstartError(f"the engines have KV caches of different sizes: {sorted(blocks)} blocks")
        return blocks.pop() * block_tokens

    def dram_hit_tokens(self) -> int:
        """Prompt tokens that came from the dram tiers so far."""
        return sum(int(self._metrics(name).total(HIT_TOKENS, tier="dram")) for name in NAMES)

    def _metrics(self, name: str) -> Metrics:
        with self._client(name) as client:
            return Metrics(client.metrics_text())

    @contextmanager
    def _client(self, name: str) -> Iterator[Client]:
        """A connection of its own every time: vLLM closes those that are idle."""
        try:
            with closing(Client(self._ports[name], MODEL_NAME)) as client:
                yield client
        except (OSError, http.client.HTTPException, ServerTroubleError) as error:
            server = self._servers[name]
            raise QuickstartError(f"{server.name} failed while answering ({error}).\n{server.tail()}") from error

    def _dead(self, seconds: float) -> list[Server]:
        """Engines that have ended, or do so within this time: one whose core has died goes on for a moment."""
        deadline = time.monotonic() + seconds
        while not (dead := [server for server in self._servers.values() if not server.runs]):
            if time.monotonic() >= deadline:
                break
            time.sleep(0.1)
        return dead
