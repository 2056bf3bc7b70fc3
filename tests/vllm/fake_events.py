"""A fake engine's publisher of KVEvents: vLLM's wire format, its replays, and batches lost on the way."""

import time
from collections import deque
from dataclasses import dataclass, field

import msgspec
import zmq
import zmq.asyncio

from tests.vllm.fake_cache import Event

END = b"\xff" * 8
BUFFERED = 10_000


@dataclass
class Publisher:
    """Binds both sockets; to be made within a running loop."""

    port: int
    replay_port: int
    # Batches that are numbered and kept for replays, but do not reach subscribers.
    to_lose: int = 0
    _next: int = 0
    _kept: deque[tuple[bytes, bytes]] = field(default_factory=lambda: deque(maxlen=BUFFERED))

    def __post_init__(self) -> None:
        self._context = zmq.asyncio.Context()
        self._live = zmq.Context(self._context).socket(zmq.PUB)
        self._live.set(zmq.LINGER, 0)
        self._live.bind(f"tcp://*:{self.port}")
        self._replay = self._context.socket(zmq.ROUTER)
        self._replay.set(zmq.LINGER, 0)
        self._replay.bind(f"tcp://*:{self.replay_port}")

    def publish(self, events: list[Event]) -> None:
        """One batch."""
        number = self._next.to_bytes(8, "big")
        payload = msgspec.msgpack.encode([time.time(), events, 0])
        self._next += 1
        self._kept.append((number, payload))
        if self.to_lose:
            self.to_lose -= 1
            return
        self._live.send_multipart((b"", number, payload))

    async def answer_replays(self) -> None:
        """Serves replays for ever."""
        while True:
            client, _, start = await self._replay.recv_multipart()
            for number, payload in list(self._kept):
                if number >= start:
                    await self._replay.send_multipart((client, b"", b"", number, payload))
            await self._replay.send_multipart((client, b"", b"", END, b""))
