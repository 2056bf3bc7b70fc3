"""Fake engines from outside: their processes, their ports, and what their operator may ask of them."""

import contextlib
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import httpx

from tests.deadlines import deadline

# On a good machine; see `deadline`.
READY_S = 30.0
ANSWER_S = 60.0
BLOCKS = 600
BLOCK_TOKENS = 16


def low_port() -> int:
    """A free port that no outgoing connection gets: one that an engine can come back to after it was dead."""
    first_ephemeral = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    while True:
        port = random.SystemRandom().randrange(10_000, max(first_ephemeral, 12_000))
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("0.0.0.0", port))  # noqa: S104 - so does the publisher
            return port


def client(port: int, good_s: float) -> httpx.Client:
    """A client of a port of this machine."""
    return httpx.Client(base_url=f"http://127.0.0.1:{port}", trust_env=False, timeout=deadline(good_s))


@dataclass
class Fake:
    """One engine on fixed ports; it may live several times."""

    name: str
    work_dir: Path
    blocks: int = BLOCKS
    block_tokens: int = BLOCK_TOKENS
    model: str = "model"
    # Tokens a second, and whether prompts are computed one after the other, as on a busy machine.
    prefill_rate: float = 40_000.0
    one_by_one: bool = False
    # Whether events say that each block lies in host memory, too.
    host_tier: bool = False
    # Names of adapters that it serves beside its model, with blanks between.
    adapters: str = ""
    # A PEM file with key and certificate; a path that everything lies below; a key clients need.
    tls: str = ""
    prefix: str = ""
    api_key: str = ""
    port: int = field(default_factory=low_port)
    admin_port: int = field(default_factory=low_port)
    events_port: int = field(default_factory=low_port)
    replay_port: int = field(default_factory=low_port)
    process: subprocess.Popen[bytes] | None = None

    def __post_init__(self) -> None:
        self.client = client(self.port, ANSWER_S)
        self.operator = client(self.admin_port, READY_S)

    @property
    def seen(self) -> Path:
        """Where it notes every request, over all of its lives."""
        return self.work_dir / f"{self.name}.seen.jsonl"

    def spec(self, *, draining: bool = False) -> dict[str, object]:
        """As in the router's file."""
        return {
            "name": self.name,
            "url": f"{'https' if self.tls else 'http'}://127.0.0.1:{self.port}{self.prefix}",
            "events": f"tcp://127.0.0.1:{self.events_port}",
            "replay": f"tcp://127.0.0.1:{self.replay_port}",
            "draining": draining,
        }

    def start(self) -> None:
        """Begins a life with an empty cache, and waits for its first answer."""
        assert self.process is None, f"{self.name} lives"
        command = [sys.executable, "-m", "tests.vllm.fake_engine", "--name", self.name, "--seen", str(self.seen)]
        options = [
            "port",
            "admin_port",
            "events_port",
            "replay_port",
            "blocks",
            "block_tokens",
            "model",
            "prefill_rate",
        ]
        options += [option for option in ("adapters", "tls", "prefix", "api_key") if getattr(self, option)]
        for option in options:
            command += [f"--{option.replace('_', '-')}", str(getattr(self, option))]
        command += ["--one-by-one"] if self.one_by_one else []
        command += ["--host-tier"] if self.host_tier else []
        log = self.work_dir / f"{self.name}.log"
        with log.open("ab") as output:
            self.process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
        end = time.monotonic() + deadline(READY_S)
        while True:
            with contextlib.suppress(httpx.TransportError):
                self.operator.get("/state")
                return
            if self.process.poll() is not None or time.monotonic() > end:
                raise AssertionError(f"{self.name} ended with {self.process.poll()}:\n{log.read_text()}")
            time.sleep(0.05)

    def kill(self, how: signal.Signals = signal.SIGKILL) -> None:
        """Ends its life."""
        if self.process is not None:
            self.process.send_signal(how)
            self.process.wait(deadline(READY_S))
            self.process = None

    def close(self) -> None:
        """Ends everything."""
        self.kill()
        self.client.close()
        self.operator.close()

    def tell(self, path: str, **what: object) -> None:
        """Asks its operator's interface for a change."""
        self.operator.post(path, json=what).raise_for_status()

    def held(self, prompts: Sequence[Sequence[int]]) -> list[int]:
        """Leading tokens of prompts that its cache really has."""
        found: list[int] = self.operator.post("/held", json=[list(tokens) for tokens in prompts]).json()
        return found

    def is_idle(self) -> bool:
        """It works on nothing."""
        return int(self.operator.get("/state").json()["open"]) == 0


@contextlib.contextmanager
def open_fake(work_dir: Path, blocks: int, block_tokens: int) -> Iterator[Fake]:
    """One engine, running."""
    engine = Fake("fake", work_dir, blocks, block_tokens)
    try:
        engine.start()
        yield engine
    finally:
        engine.close()
