"""A real `vllm serve` on a free loopback port, with our connector."""

import contextlib
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from tests.deadlines import PACE, deadline
from tests.vllm import oplog, speed
from tests.vllm.answers import Answer
from tests.vllm.metrics import Snapshot
from tests.vllm.places import real_model
from tests.vllm.processes import Family, family, kill, wait_until
from tests.vllm.sizes import DATA_TYPE, MIB, kv_bytes

# On a good machine these are long; see `deadline`.
START_S = 600.0
STOP_S = 15.0
ANSWER_S = 400.0
SETTLE_S = 60.0
# What a start takes on a good machine that does something else beside it.
START_GOOD_S = 60.0

# The smallest blocks that the CPU's attention kernels take; 64 of them hold two of the longest
# requests.
BLOCK_TOKENS = 32
KV_BLOCKS = 65
MAX_MODEL_LEN = 1024
CHUNK_TOKENS = 256


def free_port(count: int = 1) -> int:
    """A loopback port that nobody listens on, the first of so many in a row."""
    while True:
        with contextlib.ExitStack() as held:
            first = held.enter_context(socket.socket())
            first.bind(("127.0.0.1", 0))
            port = int(first.getsockname()[1])
            try:
                for number in range(port + 1, port + count):
                    held.enter_context(socket.socket()).bind(("127.0.0.1", number))
            except (OSError, OverflowError):
                continue
            return port


def transfer_config(cellar: Mapping[str, object], **more: object) -> dict[str, Any]:
    """vLLM's `kv_transfer_config` for our connector, found through its plugin entry point.

    A disk tier keeps nothing of the disk free unless `cellar` says so: a test must not depend on how full it is.
    """
    return {
        "kv_connector": "KVCellarConnector",
        "kv_role": "kv_both",
        "kv_connector_extra_config": {**({"nvme_reserve": 0} if "nvme_dir" in cellar else {}), **cellar},
        **more,
    }


def completion(tokens: Sequence[int], max_tokens: int, controls: Mapping[str, object] | None = None) -> dict[str, Any]:
    """The body of a greedy completion request for token ids."""
    body: dict[str, Any] = {
        "prompt": list(tokens),
        "max_tokens": max_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "logprobs": 5,
        "return_token_ids": True,
        "return_tokens_as_token_ids": True,
    }
    if controls is not None:
        body["kv_transfer_params"] = {"kvcellar": dict(controls)}
    return body


@dataclass
class Server:
    """A running server."""

    process: subprocess.Popen[bytes]
    port: int
    log: Path
    trace_file: Path
    pool_dir: Path
    client: httpx.Client
    events_port: int | None = None
    engines: int = 1
    _family: Family | None = None

    @property
    def family(self) -> Family:
        """Its processes, known once it is ready."""
        assert self._family is not None, "the server is not ready"
        return self._family

    @property
    def url(self) -> str:
        """Where it listens."""
        return f"http://127.0.0.1:{self.port}"

    def log_tail(self) -> str:
        """The last lines that the server wrote."""
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-60:])

    def wait_ready(self) -> None:
        """Waits for the first healthy answer."""
        begun, patience_s = time.monotonic(), deadline(START_S)
        while True:
            if self.process.poll() is not None:
                raise RuntimeError(
                    f"the server ended with {self.process.returncode} before it was ready:\n{self.log_tail()}"
                )
            with contextlib.suppress(httpx.TransportError):
                if self.client.get("/health").status_code == httpx.codes.OK:
                    break
            if time.monotonic() > begun + patience_s:
                raise RuntimeError(f"the server was not ready within {patience_s:.0f} s:\n{self.log_tail()}")
            time.sleep(0.2)
        for line in self.log.read_text(errors="replace").splitlines():
            if "is served without its tiers" in line:
                # Two that share a directory, for example. A test would see an engine that keeps
                # nothing.
                raise RuntimeError(line)
        PACE.see(time.monotonic() - begun, START_GOOD_S)
        # What it answers with is waited for as the start has just taught.
        self.client.timeout = httpx.Timeout(deadline(ANSWER_S))
        self._family = family(self.process.pid, self.engines)

    def complete(
        self, tokens: Sequence[int], max_tokens: int = 8, controls: Mapping[str, object] | None = None
    ) -> Answer:
        """One completion, to its end."""
        response = self.client.post("/v1/completions", json=completion(tokens, max_tokens, controls))
        response.raise_for_status()
        return Answer.of_json(response.json())

    def metrics(self) -> Snapshot:
        """The present reading of /metrics."""
        response = self.client.get("/metrics")
        response.raise_for_status()
        return Snapshot.of_text(response.text)

    def reset(self, *, external: bool = False, running: bool = False) -> bool:
        """Asks vLLM to empty its prefix cache, and ours with `external`. Returns whether it says that it did."""
        query = {"reset_external": external, "reset_running_requests": running}
        response = self.client.post(
            "/reset_prefix_cache", params={name: str(value).lower() for name, value in query.items()}
        )
        response.raise_for_status()
        return bool(response.json()["success"])

    def trace(self) -> list[oplog.Op]:
        """The engine's operation log so far."""
        return oplog.read(self.trace_file)

    def settle(self) -> Snapshot:
        """Lets all copies end and all numbers arrive: requests below a block make the engine step without a key."""
        end = time.monotonic() + deadline(SETTLE_S)
        while time.monotonic() < end:
            self.complete([1, 2, 3], max_tokens=1)
            idle = self.metrics().value("vllm:num_requests_running") == 0
            if idle and oplog.outstanding(self.trace()) == 0:
                self.complete([1, 2, 3], max_tokens=1)
                return self.metrics()
            time.sleep(0.02)
        raise AssertionError(
            f"copies or requests did not end: {oplog.outstanding(self.trace())} outstanding\n{self.log_tail()}"
        )

    def stop(self) -> None:
        """Ends the server as an operator would, then by force; and whatever it left running."""
        self.process.terminate()
        try:
            self.process.wait(deadline(STOP_S))
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.sweep()
        self.client.close()

    def sweep(self) -> None:
        """Kills what is left of the server and waits for its end."""
        if self._family is None:
            return
        for process in self._family.survivors():
            kill(process)
        members = self._family
        wait_until(lambda: not members.survivors(), "the end of the server's processes")


@contextlib.contextmanager
def open_server(
    work_dir: Path,
    pool_dir: Path,
    *,
    cellar: Mapping[str, object],
    model: Path | None = None,
    kv_blocks: int = KV_BLOCKS,
    name: str = "server",
    port: int | None = None,
    events_port: int | None = None,
    more: Sequence[str] = (),
    before: Sequence[str] = (),
    env: Mapping[str, str] | None = None,
    engines: int = 1,
) -> Iterator[Server]:
    """Starts a server and ends all of its processes afterwards.

    With `events_port` it publishes its events there and replays them one port above. `more`: further options of vLLM.
    `before`: a command that runs the server as its own. `engines`: how many data-parallel engines it has. Of our
    configuration, `cellar`, None takes a key away.
    """
    port = port or free_port()
    speed.learn()
    log = work_dir / f"{name}.log"
    trace_file = work_dir / f"{name}.trace.jsonl"
    settings = {"pool_dir": str(pool_dir), "trace_file": str(trace_file), **cellar}
    config = transfer_config({key: value for key, value in settings.items() if value is not None})
    command = [*before, sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", str(model or real_model())]
    command += ["--host", "127.0.0.1", "--port", str(port), "--served-model-name", "model", "--seed", "0"]
    command += ["--enforce-eager", "--block-size", str(BLOCK_TOKENS), "--num-gpu-blocks-override", str(kv_blocks)]
    command += ["--dtype", DATA_TYPE.name, "--kv-cache-memory-bytes", str(kv_bytes(256 * MIB))]
    command += ["--max-model-len", str(MAX_MODEL_LEN), "--max-num-seqs", "8"]
    command += ["--max-num-batched-tokens", str(CHUNK_TOKENS), "--enable-prompt-tokens-details"]
    command += ["--kv-transfer-config", json.dumps(config)]
    if engines > 1:
        command += ["--data-parallel-size", str(engines)]
    command += more
    if events_port is not None:
        # vLLM binds where an address has a star, and connects to it otherwise.
        endpoints = {"endpoint": f"tcp://*:{events_port}", "replay_endpoint": f"tcp://*:{events_port + 1}"}
        events = {"enable_kv_cache_events": True, "publisher": "zmq", **endpoints}
        command += ["--kv-events-config", json.dumps(events)]
    environment = {**os.environ, "VLLM_SERVER_DEV_MODE": "1", **(env or {})}
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, env=environment, start_new_session=True
        )
    client = httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=deadline(ANSWER_S), trust_env=False)
    server = Server(process, port, log, trace_file, pool_dir, client, events_port, engines)
    try:
        server.wait_ready()
        yield server
    finally:
        server.stop()
