"""Streaming client of the chat completions API, through the router: one request at a time over one kept connection."""

import http.client
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from quickstart_lib.client import REQUEST_SECONDS_MAX, server_sent_events
from quickstart_lib.failure import ServerTroubleError

Message = dict[str, str]


@dataclass(frozen=True)
class Reply:
    """What one request returned, and where it went.

    `number`: the router's, in the order of its decisions.
    `ttft_seconds`: from before the request is written to the first chunk that carries text or a token.
    `predicted_tokens`: what the router expected `cached_tokens` to be.
    `prefix_from`: how it knew: `precise`, `approximate` or `none`.
    `considered`: for every engine, best first: its name, the tokens it was taken to hold, its score.
    """

    number: int
    ttft_seconds: float
    text: str
    prompt_tokens: int
    cached_tokens: int
    engine: str
    predicted_tokens: int
    prefix_from: str
    considered: tuple[tuple[str, int, float], ...] = ()

    @property
    def computed_tokens(self) -> int:
        """Prompt tokens that the engine had to compute."""
        return self.prompt_tokens - self.cached_tokens


class Chat:
    """Talks to the router on the loopback interface."""

    def __init__(self, port: int, model_name: str, output_tokens: int) -> None:
        self._connection = http.client.HTTPConnection("127.0.0.1", port, timeout=REQUEST_SECONDS_MAX)
        self._model_name = model_name
        self._output_tokens = output_tokens

    def close(self) -> None:
        """Close the connection."""
        self._connection.close()

    def ask(self, messages: list[Message]) -> Reply:
        """Send a conversation, greedy, and stream the answer.

        Raises:
            ServerTroubleError: it was refused, or its stream broke off.
        """
        body = json.dumps(
            {
                "model": self._model_name,
                "messages": messages,
                "max_tokens": self._output_tokens,
                "temperature": 0,
                "ignore_eos": True,
                "stream": True,
                "stream_options": {"include_usage": True},
            }
        )
        started = time.perf_counter()
        headers = {"Content-Type": "application/json", "x-kvcellar-debug": "1"}
        self._connection.request("POST", "/v1/chat/completions", body, headers)
        response = self._connection.getresponse()
        if response.status != 200:
            raise ServerTroubleError(f"a request was refused with status {response.status}: {response.read(2000)!r}")
        decision = json.loads(response.getheader("x-kvcellar-decision", "{}"))
        if not decision:
            raise ServerTroubleError("the router did not say what it decided")
        return _collect(server_sent_events(response), started, decision)


def _collect(events: Iterator[dict[str, Any]], started: float, decision: dict[str, Any]) -> Reply:
    ttft_seconds: float | None = None
    text: list[str] = []
    usage: dict[str, Any] = {}
    for event in events:
        if "error" in event:
            raise ServerTroubleError(f"the server reported {event['error']}")
        for choice in event["choices"]:
            content = choice["delta"].get("content") or ""
            if content and ttft_seconds is None:
                ttft_seconds = time.perf_counter() - started
            text.append(content)
        usage = event.get("usage") or usage
    if ttft_seconds is None or not usage:
        raise ServerTroubleError("the stream held no text or no usage record")
    cached_tokens = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
    return Reply(
        decision["id"],
        ttft_seconds,
        "".join(text),
        usage["prompt_tokens"],
        cached_tokens,
        decision["engine"],
        decision["predicted_cached"],
        decision["prefix_from"],
        tuple((it["engine"], it["held_tokens"], it["total"]) for it in decision["considered"]),
    )
