"""Requests as no client should send them, drawn at random: a client's values must never reach further than itself."""

import asyncio
import json
import random
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import httpx

from tests.vllm.prompts import prompt

AT_ONCE = 16
PROMPTS = 24
# A header of h11's has at most 64 KiB with all others.
HEADER_BYTES_MAX = 40_000
ODD_TEXTS = (
    "",
    " ",
    "#1",
    "#",
    "a" * 199,
    "a" * 201,
    "a" * 5_000,
    "a" * 100_000,
    "\u0000",
    "line\nbreak\ttab",
    "\u202e\u200b\ufeff",
    "日本語のリクエスト",
    "🧊" * 300,
    "\ud800",
    "\udfff tail",
    "%s%n{}{0}",
    "../../../../etc/passwd",
    "'; DROP TABLE blocks; --",
)
DEEP = json.loads("[" * 90 + "]" * 90)
ODD_VALUES: tuple[Any, ...] = (
    None,
    True,
    False,
    0,
    -1,
    1.5,
    2**31,
    2**32,
    2**63,
    10**40,
    "false",
    "",
    "\ud800",
    [],
    [[]],
    {},
    {"store": []},
    DEEP,
    {"x": DEEP},
    ["a" * 10_000],
)
CONTROL_KEYS = ("store", "load", "max_load_tokens", "stor", "", "\ud800", "kvcellar", "a" * 3_000)


NO_ANSWER = "no answer"


@dataclass(frozen=True)
class OddRequest:
    """One request: where it goes, its body, its headers, and after how many seconds the client hangs up, if at all."""

    path: str
    body: dict[str, Any]
    headers: dict[str, bytes]
    patience_s: float | None


class OddRequests:
    """An endless stream of them."""

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng
        self._prompts = [prompt(rng, rng.randint(20, 150)) for _ in range(PROMPTS)]

    def __iter__(self) -> Iterator[OddRequest]:
        while True:
            yield self.one()

    def one(self) -> OddRequest:
        """The next request."""
        rng = self._rng
        body: dict[str, Any] = {"model": "model", "max_tokens": rng.randint(1, 4), "temperature": 0}
        chat = rng.random() < 0.25
        if chat:
            body["messages"] = [{"role": "user", "content": rng.choice(("Hello", *ODD_TEXTS[8:14]))}]
        else:
            body["prompt"] = self._prompt()
        for oddity in rng.sample(self._oddities(chat), rng.randint(1, 3)):
            body.update(oddity)
        headers = {"content-type": b"application/json"}
        if rng.random() < 0.3:
            text = rng.choice(ODD_TEXTS).encode("utf-8", "surrogatepass")
            headers["x-request-id"] = text.replace(b"\n", b" ").replace(b"\0", b" ").strip()[:HEADER_BYTES_MAX]
        patience_s = rng.choice((0.001, 0.02, 0.1, 0.4)) if rng.random() < 0.15 else None
        return OddRequest(f"/v1/{'chat/' if chat else ''}completions", body, headers, patience_s)

    def _prompt(self) -> Any:
        rng = self._rng
        kind = rng.random()
        if kind < 0.8:
            return rng.choice(self._prompts)
        if kind < 0.9:
            return rng.sample(self._prompts, 2)
        return rng.choice(("", [], [-1], [0] * 40, [2**40], "a" * 30, rng.choice(ODD_TEXTS), [[], [1]], None, {"a": 1}))

    def _oddities(self, chat: bool) -> Sequence[dict[str, Any]]:
        rng = self._rng
        controls: dict[str, Any] = {rng.choice(CONTROL_KEYS): rng.choice(ODD_VALUES) for _ in range(rng.randint(1, 3))}
        odd: list[dict[str, Any]] = [
            {"request_id": rng.choice(ODD_TEXTS)},
            {"request_id": rng.choice(ODD_VALUES)},
            {"request_id": "the same for many"},
            {"kv_transfer_params": {"kvcellar": controls}},
            {"kv_transfer_params": {"kvcellar": rng.choice(ODD_VALUES)}},
            {"kv_transfer_params": rng.choice(ODD_VALUES)},
            {"kv_transfer_params": {rng.choice(ODD_TEXTS): rng.choice(ODD_VALUES)}},
            {"kv_transfer_params": {"do_remote_decode": True, "kvcellar": controls}},
            {"cache_salt": rng.choice(ODD_TEXTS)},
            {"cache_salt": rng.choice(ODD_VALUES)},
            {"cache_salt": f"tenant {rng.randint(0, 3)}"},
            {"model": rng.choice(ODD_TEXTS)},
            {"n": rng.choice((0, 2, 3)), "temperature": 1.0},
            {"prompt_logprobs": rng.choice((0, 1, 5))},
            {"logprobs": rng.choice((True, 1, 3))},
            {"priority": rng.choice((-5, 0, 7, 2**70))},
            {"use_beam_search": True, "n": 2},
            {"stream": True},
            {"stream": True, "stream_options": {"include_usage": True}},
            # A seed that can be used ends vLLM 0.32's CPU build by itself: its generators cannot
            # step back.
            {"seed": 2**70, "temperature": 0.7},
            {"stop": rng.choice((["\n"], ["a" * 500], [""], 7))},
            {"max_tokens": rng.choice((0, 1, 40, -1, 10**9))},
            {"min_tokens": 3, "max_tokens": 5},
            {"logit_bias": {"5": 100, "-1": 3}},
            {"ignore_eos": True, "repetition_penalty": 1.3},
            {"response_format": {"type": "json_object"}},
            {"structured_outputs": {"choice": ["yes", "no"]}},
        ]
        if chat:
            tool = {
                "type": "function",
                "function": {"name": "look", "parameters": {"type": "object", "properties": {}}},
            }
            odd += [{"tools": [tool], "tool_choice": choice} for choice in ("none", "auto", "required")]
        else:
            odd += [{"echo": True}, {"suffix": "x"}, {"add_special_tokens": False}]
        return odd


async def _send(client: httpx.AsyncClient, request: OddRequest) -> str:
    # Lone surrogates travel as JSON escapes, which httpx's own encoder would refuse.
    content = json.dumps(request.body).encode()
    try:
        async with asyncio.timeout(request.patience_s):
            async with client.stream("POST", request.path, content=content, headers=request.headers) as response:
                text = (await response.aread()).decode(errors="replace")
    except TimeoutError:
        return "hung up"
    except httpx.TimeoutException:
        return f"{NO_ANSWER}: {request.path} {json.dumps(request.body)[:2000]} {str(request.headers)[:300]}"
    except httpx.TransportError:
        # The HTTP server ends connections whose headers it cannot read.
        return "closed"
    return str(response.status_code) if response.status_code < 500 else f"{response.status_code}: {text[:300]}"


async def _send_all(url: str, requests: Sequence[OddRequest], timeout_s: float) -> list[str]:
    slots = asyncio.Semaphore(AT_ONCE)
    async with httpx.AsyncClient(base_url=url, timeout=timeout_s, trust_env=False) as client:

        async def send(request: OddRequest) -> str:
            async with slots:
                return await _send(client, request)

        return list(await asyncio.gather(*(send(request) for request in requests)))


def send_all(url: str, requests: Sequence[OddRequest], timeout_s: float) -> Counter[str]:
    """Sends all, some at a time. Returns how often each came back: a status, or that the client hung up."""
    return Counter(asyncio.run(_send_all(url, requests, timeout_s)))
