"""Streaming client of vLLM's completions API: one request at a time over one kept connection."""

import http.client
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from quickstart_lib.failure import QuickstartError, ServerTroubleError

TOP_LOGPROBS = 5
REQUEST_SECONDS_MAX = 300.0
# vLLM closes connections that are idle for 5 s.
IDLE_SECONDS_MAX = 2.0


@dataclass(frozen=True)
class Answer:
    """What one request returned.

    `ttft_seconds`: from before the request is written to the first chunk that carries a token.
    `top_logprobs`: for each output token, token id (as text) to log probability, as the server sent it.
    `cached_tokens`: prompt tokens that were not computed, whichever cache they came from.
    """

    ttft_seconds: float
    text: str
    token_ids: tuple[int, ...]
    top_logprobs: tuple[tuple[tuple[str, float], ...], ...]
    cached_tokens: int

    def differences(self, other: "Answer") -> list[str]:
        """Where the two outputs are not bit for bit the same; empty when they are."""
        found = []
        if self.text != other.text:
            found.append(f"text {self.text!r} against {other.text!r}")
        if self.token_ids != other.token_ids:
            found.append(f"token ids {self.token_ids} against {other.token_ids}")
        for position, (mine, theirs) in enumerate(zip(self.top_logprobs, other.top_logprobs, strict=False)):
            if mine != theirs:
                found.append(f"top {TOP_LOGPROBS} logprobs of output token {position}: {mine} against {theirs}")
                break
        if len(self.top_logprobs) != len(other.top_logprobs):
            found.append(f"{len(self.top_logprobs)} output tokens with logprobs against {len(other.top_logprobs)}")
        return found

    @property
    def logprob_count(self) -> int:
        """Number of log probabilities in this answer."""
        return sum(len(position) for position in self.top_logprobs)


class Client:
    """Talks to one server on the loopback interface."""

    def __init__(self, port: int, model_name: str) -> None:
        self._connection = http.client.HTTPConnection("127.0.0.1", port, timeout=REQUEST_SECONDS_MAX)
        self._model_name = model_name
        self._used = time.monotonic()

    def close(self) -> None:
        """Close the connection."""
        self._connection.close()

    def complete(self, prompt: list[int], output_tokens: int, transfer_params: dict[str, Any] | None = None) -> Answer:
        """Send `prompt` (token ids), greedy, and stream exactly `output_tokens` tokens.

        Args:
            prompt: token ids.
            output_tokens: how many.
            transfer_params: `kv_transfer_params`, e.g. what `hand_over` returned.

        Raises:
            ServerTroubleError: the server refused, or its stream broke off.
            QuickstartError: the stream did not hold what was asked for.
        """
        body = json.dumps(
            {
                "model": self._model_name,
                "prompt": prompt,
                "max_tokens": output_tokens,
                "temperature": 0,
                "ignore_eos": True,
                "logprobs": TOP_LOGPROBS,
                "return_token_ids": True,
                "return_tokens_as_token_ids": True,
                "stream": True,
                "stream_options": {"include_usage": True},
                **({"kv_transfer_params": transfer_params} if transfer_params is not None else {}),
            }
        )
        self._connect_anew_if_idle()
        started = time.perf_counter()
        self._connection.request("POST", "/v1/completions", body, {"Content-Type": "application/json"})
        response = self._connection.getresponse()
        if response.status != 200:
            raise ServerTroubleError(f"completion refused with status {response.status}: {response.read(2000)!r}")
        answer = _collect(server_sent_events(response), started)
        self._used = time.monotonic()
        if len(answer.token_ids) != output_tokens or len(answer.top_logprobs) != output_tokens:
            raise QuickstartError(f"asked for {output_tokens} tokens with logprobs, got {len(answer.token_ids)}")
        return answer

    def hand_over(self, prompt: list[int]) -> dict[str, Any]:
        """Have `prompt` computed here for another engine. Returns the `kv_transfer_params` that it needs.

        Raises:
            ServerTroubleError: the server refused.
            QuickstartError: it hands nothing over.
        """
        elsewhere = {"do_remote_decode": True, "do_remote_prefill": False, "remote_engine_id": None}
        elsewhere |= {"remote_block_ids": None, "remote_host": None, "remote_port": None}
        body = {"model": self._model_name, "prompt": prompt, "max_tokens": 1, "temperature": 0}
        status, content = self._exchange(
            "POST", "/v1/completions", json.dumps({**body, "kv_transfer_params": elsewhere})
        )
        if status != 200:
            raise ServerTroubleError(f"completion refused with status {status}: {content[:2000]!r}")
        params: dict[str, Any] | None = json.loads(content).get("kv_transfer_params")
        if not params or not params.get("remote_block_ids"):
            raise QuickstartError(f"the engine hands no block over: {params}")
        return params

    def reset_prefix_cache(self, *, external: bool = False) -> None:
        """Empty vLLM's own prefix cache; the connector's tiers keep what they hold unless `external` is set.

        Raises:
            ServerTroubleError: the server kept refusing, which it does while blocks are still in use.
        """
        deadline = time.monotonic() + 10.0
        while time.monotonic() < deadline:
            status, content = self._exchange("POST", f"/reset_prefix_cache?reset_external={str(external).lower()}")
            if status != 200:
                raise ServerTroubleError(f"/reset_prefix_cache answered {status}: {content[:500]!r}")
            if json.loads(content)["success"]:
                return
            time.sleep(0.05)
        raise ServerTroubleError("vLLM refused to reset its prefix cache for 10 s: some blocks stayed in use")

    def metrics_text(self) -> str:
        """The server's metrics in Prometheus text format."""
        status, content = self._exchange("GET", "/metrics")
        if status != 200:
            raise ServerTroubleError(f"/metrics answered {status}")
        return content.decode()

    def _exchange(self, method: str, path: str, body: str | None = None) -> tuple[int, bytes]:
        self._connect_anew_if_idle()
        headers = {} if body is None else {"Content-Type": "application/json"}
        self._connection.request(method, path, body, headers)
        response = self._connection.getresponse()
        content = response.read()
        self._used = time.monotonic()
        return response.status, content

    def _connect_anew_if_idle(self) -> None:
        if time.monotonic() - self._used > IDLE_SECONDS_MAX:
            # The next request opens it again.
            self._connection.close()


def server_sent_events(response: http.client.HTTPResponse) -> Iterator[dict[str, Any]]:
    """The chunks of a streamed answer, up to its end mark.

    Raises:
        ServerTroubleError: the stream broke off.
    """
    for line in response:
        if not line.startswith(b"data: "):
            continue
        payload = line[len(b"data: ") :].strip()
        if payload == b"[DONE]":
            response.read()
            return
        yield json.loads(payload)
    raise ServerTroubleError("the server closed the stream before its end")


def _collect(events: Iterator[dict[str, Any]], started: float) -> Answer:
    ttft_seconds: float | None = None
    text: list[str] = []
    token_ids: list[int] = []
    top_logprobs: list[tuple[tuple[str, float], ...]] = []
    cached_tokens: int | None = None
    for event in events:
        if "error" in event:
            raise ServerTroubleError(f"the server reported {event['error']}")
        for choice in event["choices"]:
            if choice.get("token_ids") and ttft_seconds is None:
                ttft_seconds = time.perf_counter() - started
            text.append(choice["text"])
            token_ids += choice.get("token_ids") or []
            if choice.get("logprobs"):
                top_logprobs += [tuple(sorted(position.items())) for position in choice["logprobs"]["top_logprobs"]]
        if event.get("usage"):
            cached_tokens = (event["usage"].get("prompt_tokens_details") or {}).get("cached_tokens", 0)
    if ttft_seconds is None or cached_tokens is None:
        raise ServerTroubleError("the stream held no token or no usage record")
    return Answer(ttft_seconds, "".join(text), tuple(token_ids), tuple(top_logprobs), cached_tokens)
