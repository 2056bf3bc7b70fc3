"""A ZMQ subscriber of KVEvents that decodes the wire format with nothing of vLLM's."""

import threading
from dataclasses import dataclass, field
from typing import Any, Self

import msgspec
import zmq

POLL_MS = 50
Event = dict[str, Any]


@dataclass
class Subscriber:
    """Collects all events in a thread of its own, from the first batch on: it connects before the publisher exists."""

    endpoint: str
    events: list[Event] = field(default_factory=list)
    sequences: list[int] = field(default_factory=list)
    _stop: threading.Event = field(default_factory=threading.Event)
    _thread: threading.Thread | None = None

    def __enter__(self) -> Self:
        """Starts to listen."""
        self._thread = threading.Thread(target=self._listen, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Stops."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()

    def _listen(self) -> None:
        with zmq.Context() as context, context.socket(zmq.SUB) as socket:
            socket.set(zmq.LINGER, 0)
            socket.set(zmq.RECONNECT_IVL, 20)
            socket.set(zmq.RECONNECT_IVL_MAX, 100)
            socket.subscribe(b"")
            socket.connect(self.endpoint)
            while not self._stop.is_set():
                if socket.poll(POLL_MS):
                    _, sequence, payload = socket.recv_multipart()
                    batch = msgspec.msgpack.decode(payload)
                    # The number goes in last: whoever sees it sees the batch's events too.
                    self.events.extend(batch[1])
                    self.sequences.append(int.from_bytes(sequence, "big"))

    def of(self, kind: str, medium: str) -> list[Event]:
        """All events of one kind and medium, in order."""
        return [event for event in self.events if event["type"] == kind and event.get("medium") == medium]
