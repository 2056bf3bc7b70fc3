"""What clients of a soak ask for: seeded requests of every kind, good ones, bad ones, and clients that misbehave."""

import json
from dataclasses import dataclass, field, replace
from enum import StrEnum
from functools import cached_property
from random import Random
from typing import Any

from tests.vllm.fake_answers import MODEL, MODEL_LEN_MAX, VOCABULARY, next_token
from tests.vllm.fake_faults import HEADER, ID_HEADER, Fault

FAMILIES = 8
BODY_BYTES_MAX = 6 << 20
LARGE_BYTES = 4 << 20


class Leave(StrEnum):
    """When a client goes away."""

    NEVER = "never"
    UPLOAD = "upload"
    BEFORE = "before"
    MID = "mid"


@dataclass(frozen=True)
class Plan:
    """One request and how its client behaves."""

    number: int
    front: str
    kind: str
    method: str
    path: str
    body: bytes
    fault: str = ""
    leave: Leave = Leave.NEVER
    slow: bool = False
    prompt: tuple[int, ...] = ()
    max_tokens: int = 0

    @property
    def headers(self) -> dict[str, str]:
        """Of the request."""
        headers = {ID_HEADER: str(self.number), "x-kvcellar-debug": "1"}
        if self.body:
            headers["content-type"] = "application/json"
        return headers | ({HEADER: self.fault} if self.fault else {})

    @property
    def text(self) -> str:
        """What an engine answers to given ids."""
        tokens = list(self.prompt)
        for _ in range(self.max_tokens):
            tokens.append(next_token(tokens))
        return "".join(f" {token}" for token in tokens[len(self.prompt) :])


# Kinds by how often they come.
WEIGHTS = {
    "ids": 45.0,
    "chat": 15.0,
    "health": 4.0,
    "models": 2.0,
    "malformed": 2.5,
    "no-prompt": 1.5,
    "unknown-model": 2.5,
    "too-long": 1.5,
    "large-ids": 0.2,
    "large-text": 0.2,
    "too-large": 0.2,
    "leave-upload": 1.0,
    "leave-before": 3.0,
    "leave-mid": 5.0,
    "slow-reader": 1.5,
    "fault": 15.0,
}


@dataclass
class Planner:
    """Makes requests, one after the other; the same ones for the same seed."""

    random: Random
    engines: tuple[str, ...]
    _made: int = 0
    families: list[list[int]] = field(default_factory=list)
    # The last prompt of every family.
    latest: dict[int, list[int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for _ in range(FAMILIES):
            self.families.append(self._tokens(self.random.randrange(100, 1000)))

    def _tokens(self, count: int) -> list[int]:
        return [self.random.randrange(VOCABULARY) for _ in range(count)]

    @cached_property
    def large(self) -> dict[str, bytes]:
        """Bodies of megabytes, made once."""
        ids = self._tokens(LARGE_BYTES // 7)
        return {
            "large-ids": body_of(ids),
            "large-text": json.dumps({"model": MODEL, "prompt": "word " * (LARGE_BYTES // 5)}).encode(),
            "too-large": json.dumps({"model": MODEL, "prompt": "x" * (BODY_BYTES_MAX + 1000)}).encode(),
        }

    def next(self) -> Plan:
        """One more request."""
        kind = self.random.choices(list(WEIGHTS), list(WEIGHTS.values()))[0]
        self._made += 1
        make = getattr(self, f"_{kind.split('-')[0]}")
        front = self.random.choice(["proxy", "envoy"])
        plan: Plan = make(kind, {"number": self._made, "front": front, "kind": kind, "method": "POST"})
        return plan

    def probe(self, prompt: list[int]) -> Plan:
        """A request that every engine fails, for the decision that is made on it."""
        self._made += 1
        body = body_of(prompt)
        base = Plan(self._made, "proxy", "probe", "POST", "/v1/completions", body, f"{Fault.ERROR}@*")
        return replace(base, prompt=tuple(prompt))

    def _prompt(self) -> list[int]:
        number = self.random.randrange(FAMILIES)
        family = self.families[number]
        shared = family[: self.random.randrange(20, len(family) + 1)]
        self.latest[number] = shared + self._tokens(self.random.randrange(1, 120))
        return self.latest[number]

    def _ids(self, kind: str, base: dict[str, Any], *, stream: bool | None = None, tokens: int | None = None) -> Plan:
        prompt, max_tokens = self._prompt(), tokens or self.random.randrange(1, 25)
        streamed = self.random.random() < 0.6 if stream is None else stream
        body = body_of(prompt, max_tokens, stream=streamed)
        base |= {"path": "/v1/completions", "body": body, "prompt": tuple(prompt), "max_tokens": max_tokens}
        return Plan(**base)

    def _chat(self, kind: str, base: dict[str, Any]) -> Plan:
        family = self.random.choice(self.families)
        turns = [
            {"role": "system", "content": " ".join(map(str, family[:60]))},
            {"role": "user", "content": " ".join(map(str, self._tokens(30)))},
        ]
        body: dict[str, Any] = {"model": MODEL, "messages": turns, "max_tokens": self.random.randrange(1, 20)}
        if self.random.random() < 0.6:
            body |= {"stream": True, "stream_options": {"include_usage": True}}
        return Plan(**base, path="/v1/chat/completions", body=json.dumps(body).encode())

    def _health(self, kind: str, base: dict[str, Any]) -> Plan:
        return Plan(**{**base, "method": "GET"}, path="/health", body=b"")

    def _models(self, kind: str, base: dict[str, Any]) -> Plan:
        return Plan(**{**base, "method": "GET"}, path="/v1/models", body=b"")

    def _malformed(self, kind: str, base: dict[str, Any]) -> Plan:
        return Plan(**base, path="/v1/chat/completions", body=b'{"messages": [{"role": "user"')

    def _no(self, kind: str, base: dict[str, Any]) -> Plan:
        return Plan(**base, path="/v1/completions", body=b'{"model": "model"}')

    def _unknown(self, kind: str, base: dict[str, Any]) -> Plan:
        return Plan(**base, path="/v1/completions", body=b'{"model": "of nobody", "prompt": [1]}')

    def _too(self, kind: str, base: dict[str, Any]) -> Plan:
        if kind == "too-large":
            return self._large(kind, base)
        return Plan(**base, path="/v1/completions", body=body_of(self._tokens(MODEL_LEN_MAX)))

    def _large(self, kind: str, base: dict[str, Any]) -> Plan:
        return Plan(**base, path="/v1/completions", body=self.large[kind])

    def _leave(self, kind: str, base: dict[str, Any]) -> Plan:
        leave = Leave(kind.partition("-")[2])
        base |= {"leave": leave, "fault": f"{Fault.SILENT_BEFORE}@*" if leave is Leave.BEFORE else ""}
        return self._ids(kind, base, stream=True, tokens=400)

    def _slow(self, kind: str, base: dict[str, Any]) -> Plan:
        return self._ids(kind, {**base, "slow": True}, stream=True, tokens=500)

    def _fault(self, kind: str, base: dict[str, Any]) -> Plan:
        fault = self.random.choice([fault for fault in Fault if fault is not Fault.NONE])
        where = self.random.choice([*self.engines, "*"])
        # Envoy waits as long as its route allows: there the client loses its patience.
        silent = fault in {Fault.SILENT_BEFORE, Fault.SILENT_MID} and base["front"] == "envoy"
        leave = Leave.BEFORE if silent else Leave.NEVER
        return self._ids(kind, {**base, "kind": str(fault), "fault": f"{fault}@{where}", "leave": leave}, tokens=10)


def body_of(prompt: list[int], max_tokens: int = 4, *, stream: bool = False) -> bytes:
    """A completion request for ids."""
    body: dict[str, Any] = {"model": MODEL, "prompt": prompt, "max_tokens": max_tokens}
    if stream:
        body |= {"stream": True, "stream_options": {"include_usage": True}}
    return json.dumps(body, separators=(",", ":")).encode()
