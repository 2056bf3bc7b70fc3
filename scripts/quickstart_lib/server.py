"""A server (vLLM, or the router) as a child process group: started, waited for, and always stopped."""

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType

from quickstart_lib.cache_size import BLOCK_TOKENS, CacheSize
from quickstart_lib.failure import QuickstartError, ServerTroubleError

MODEL_NAME = "smollm2-135m"
START_SECONDS_MAX = 300.0
STOP_SECONDS_MAX = 20.0
TAIL_LINES = 40


def connector_flag(**settings: object) -> str:
    """Value of `--kv-transfer-config` with these settings of ours. The pool is not kept: nothing may stay in memory
    after a server.
    """
    return json.dumps(
        {
            "kv_connector": "KVCellarConnector",
            "kv_role": "kv_both",
            "kv_connector_extra_config": {"keep_pool": False, **settings},
        }
    )


def command(model: Path, port: int, size: CacheSize, events: Mapping[str, str], connector: str | None) -> list[str]:
    """The `vllm serve` command line. Eager mode: the CPU build would otherwise call a C++ compiler.

    `events`: where KV events go, e.g. `endpoint`.
    """
    events_config = {"enable_kv_cache_events": True, "publisher": "zmq", **events}
    flags = {
        "--served-model-name": MODEL_NAME,
        "--host": "127.0.0.1",
        "--port": str(port),
        "--dtype": size.dtype,
        "--max-model-len": str(size.model_len_tokens),
        "--max-num-seqs": "8",
        "--max-num-batched-tokens": "512",
        "--block-size": str(BLOCK_TOKENS),
        "--kv-cache-memory-bytes": str(size.gpu_bytes),
        "--kv-events-config": json.dumps(events_config),
    }
    if connector is not None:
        flags["--kv-transfer-config"] = connector
    switches = ["--enable-prefix-caching", "--enable-chunked-prefill", "--enforce-eager"]
    switches.append("--enable-prompt-tokens-details")
    vllm = str(Path(sys.executable).with_name("vllm"))
    return [vllm, "serve", str(model), *switches, *(word for flag in flags.items() for word in flag)]


def free_port() -> int:
    """A loopback TCP port that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def core_shares(parts: int) -> list[str]:
    """The usable cores in equal parts, as vLLM wants them; where there are too few, everyone gets all."""
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < parts:
        return [",".join(map(str, cores))] * parts
    each = len(cores) // parts
    return [",".join(map(str, cores[part * each : (part + 1) * each])) for part in range(parts)]


class Server:
    """`with Server(...)`: inside, the server answers; afterwards, its whole process group is gone.

    States: not started, started (after `start`), ready (after `wait_until_ready`), stopped (after `stop`).
    """

    def __init__(
        self,
        command_line: list[str],
        port: int,
        log: Path,
        on_wait: Callable[[float], None],
        *,
        name: str = "vLLM",
        health: str = "/health",
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self.name = name
        self.log = log
        self._command_line = command_line
        self._port = port
        self._on_wait = on_wait
        self._health = health
        self._environment = environment or {}
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> "Server":
        self.start()
        try:
            self.wait_until_ready()
        except BaseException:
            self.stop()
            raise
        return self

    def start(self) -> None:
        """Start the process; several may be started before the first is waited for."""
        environment = {
            **os.environ,
            "VLLM_SERVER_DEV_MODE": "1",
            "VLLM_NO_USAGE_STATS": "1",
            "DO_NOT_TRACK": "1",
            "HF_HUB_OFFLINE": "1",
            "PYTHONUNBUFFERED": "1",
        }
        # The checkout's scripts are no part of the server's environment, nor is a KV cache size
        # from the shell.
        for name in ("PYTHONPATH", "PYTHONDONTWRITEBYTECODE", "VLLM_CPU_KVCACHE_SPACE"):
            environment.pop(name, None)
        environment |= self._environment
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("wb") as log:
            self._process = subprocess.Popen(
                self._command_line,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,
            )

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()
        if isinstance(error, (OSError, http.client.HTTPException, ServerTroubleError)):
            raise QuickstartError(f"{self.name} failed while answering ({error}).\n{self.tail()}") from error

    def stop(self) -> None:
        """End the server: the leader is asked first, so that it can close its children's pools and shared memory in
        order; what is left of the group is killed. Safe to call twice.
        """
        if self._process is None:
            return
        if self._process.poll() is None:
            self._process.terminate()
        deadline = time.monotonic() + STOP_SECONDS_MAX
        try:
            while self._group_alive() and time.monotonic() < deadline:
                self._process.poll()
                time.sleep(0.1)
        finally:  # also when a second Ctrl-C ends the wait
            self._kill_group()
            self._process.wait()

    def wait_until_ready(self) -> None:
        """Wait for the first healthy answer.

        Raises:
            QuickstartError: it ended before, or took too long; with the end of its log.
        """
        started = time.monotonic()
        while not self._healthy():
            elapsed = time.monotonic() - started
            if not self.runs:
                raise QuickstartError(f"{self.name} ended before it was ready.\n{self.tail()}")
            if elapsed > START_SECONDS_MAX:
                raise QuickstartError(f"{self.name} was not ready after {START_SECONDS_MAX:.0f} s.\n{self.tail()}")
            self._on_wait(elapsed)
            time.sleep(0.5)

    @property
    def runs(self) -> bool:
        """Whether its process was started and has not ended."""
        return self._process is not None and self._process.poll() is None

    def tail(self) -> str:
        """The last lines of its log, under the log's name."""
        lines = self.log.read_text(errors="replace").splitlines()[-TAIL_LINES:]
        return "\n".join([f"--- end of {self.log}", *lines, "---"])

    def _healthy(self) -> bool:
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=5.0)
        try:
            connection.request("GET", self._health)
            return connection.getresponse().status == 200
        except (OSError, http.client.HTTPException):
            return False
        finally:
            connection.close()

    def _group_alive(self) -> bool:
        return self._signal_group(0)

    def _kill_group(self) -> None:
        self._signal_group(signal.SIGKILL)

    def _signal_group(self, number: int) -> bool:
        """Whether the group, led by the process started here, still had a member to signal."""
        if self._process is None:
            return False
        try:
            os.killpg(self._process.pid, number)
        except ProcessLookupError:
            return False
        return True
