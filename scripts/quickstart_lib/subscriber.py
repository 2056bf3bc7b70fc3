"""A real KV-events subscriber: receives what vLLM publishes over ZMQ, decodes it and counts it by medium."""

import threading
from collections import Counter
from typing import Any

import msgspec
import zmq

from quickstart_lib.failure import QuickstartError

POLL_MS = 100
NO_MEDIUM = "unspecified"


class Batch(msgspec.Struct, array_like=True):
    """vLLM's batch: a msgpack array. Events stay untyped here, since unknown kinds and fields must be tolerated."""

    ts: float
    events: list[Any]
    data_parallel_rank: int | None = None


class Subscriber:
    """Binds a loopback port (vLLM's publisher connects to it) and counts in a thread of its own.

    States: receiving (from the start) and stopped (after `close`). Counts may be read in both.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._events: Counter[tuple[str, str]] = Counter()
        self._blocks: Counter[tuple[str, str]] = Counter()
        self._batches = 0
        self._batches_lost = 0
        self._cleared = 0
        self._unknown = 0
        self._next_sequence = 0
        self._error: Exception | None = None
        self._stopping = threading.Event()
        self._socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.SUB)
        self._socket.setsockopt(zmq.SUBSCRIBE, b"")
        self._socket.setsockopt(zmq.RCVHWM, 100_000)
        self.port: int = self._socket.bind_to_random_port("tcp://127.0.0.1")
        self._thread = threading.Thread(target=self._receive, name="kv-events", daemon=True)
        self._thread.start()

    @property
    def endpoint(self) -> str:
        """The address to put into `--kv-events-config`; vLLM connects to an address without wildcards."""
        return f"tcp://127.0.0.1:{self.port}"

    def close(self) -> None:
        """End the thread and close the socket."""
        self._stopping.set()
        self._thread.join()

    def removed_blocks(self, medium: str) -> int:
        """Blocks announced as removed from `medium` so far."""
        with self._lock:
            return self._blocks[medium, "removed"]

    def stored_events(self, medium: str) -> int:
        """BlockStored events with this medium so far."""
        with self._lock:
            return self._events[medium, "stored"]

    def summary(self) -> dict[str, Any]:
        """Counts for the report.

        Raises:
            QuickstartError: the receiving thread met a payload it could not decode.
        """
        with self._lock:
            if self._error is not None:
                raise QuickstartError(f"the event stream could not be decoded: {self._error!r}")
            media = sorted({medium for medium, _ in self._events})
            return {
                "by_medium": {
                    medium: {
                        f"{what}_{kind}": int(counts[medium, kind])
                        for kind in ("stored", "removed")
                        for what, counts in (("events", self._events), ("blocks", self._blocks))
                    }
                    for medium in media
                },
                "all_blocks_cleared": self._cleared,
                "unknown": self._unknown,
                "batches": self._batches,
                "batches_lost": self._batches_lost,
            }

    def _receive(self) -> None:
        decoder = msgspec.msgpack.Decoder(Batch)
        try:
            while not self._stopping.is_set():
                if self._socket.poll(POLL_MS):
                    _topic, sequence, payload = self._socket.recv_multipart()
                    self._count(int.from_bytes(sequence, "big"), decoder.decode(payload))
        except (msgspec.MsgspecError, zmq.ZMQError, ValueError, LookupError, TypeError) as error:
            with self._lock:
                self._error = error
        finally:
            self._socket.close(linger=0)

    def _count(self, sequence: int, batch: Batch) -> None:
        with self._lock:
            self._batches += 1
            self._batches_lost += max(0, sequence - self._next_sequence)
            self._next_sequence = sequence + 1
            for event in batch.events:
                self._count_event(event)

    def _count_event(self, event: dict[str, Any]) -> None:
        match event["type"]:
            case "BlockStored":
                self._add(event, "stored")
            case "BlockRemoved":
                self._add(event, "removed")
            case "AllBlocksCleared":
                self._cleared += 1
            case _:
                self._unknown += 1

    def _add(self, event: dict[str, Any], kind: str) -> None:
        medium = event.get("medium") or NO_MEDIUM
        self._events[medium, kind] += 1
        self._blocks[medium, kind] += len(event["block_hashes"])
