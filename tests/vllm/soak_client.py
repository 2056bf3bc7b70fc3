"""A soak's client: sends a request, behaves as planned, and says what it saw."""

import asyncio
import json
import re
import socket
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Self

import aiohttp

from tests.deadlines import deadline
from tests.vllm.soak_plan import Leave, Plan

# Longer than anything takes on a good machine: a request at this end, see `deadline`, is one that
# was stuck.
STUCK_S = 30.0
# A reader's pause: longer than an engine may be silent.
PAUSE_S = 3.5
TEXTS = re.compile(rb'"text":"((?: \d+)*)"')


class End(StrEnum):
    """How a request ended for its client."""

    WHOLE = "whole"
    LEFT = "left"
    BROKEN = "broken"
    STUCK = "stuck"
    # An answer that ends as if it were whole, and is not, or is another one's.
    WRONG = "wrong"


@dataclass(frozen=True)
class Record:
    """What a client saw of one request.

    Attributes:
        refusal: the error's type, where the router itself answered.
        decision: the number of the router's decision, where the answer's head had it.
        chosen: the engine that the router named.
        engine: the engine that answered.
        seconds: how long it took; said, not judged.

    """

    number: int
    front: str
    kind: str
    end: End
    status: int | None = None
    refusal: str | None = None
    decision: int | None = None
    chosen: str | None = None
    engine: str | None = None
    seconds: float = 0.0

    @property
    def label(self) -> str:
        """For tables."""
        return f"{self.front} {self.kind}: {self.status} {self.refusal or self.end}"


@dataclass
class Client:
    """Both ways in."""

    urls: dict[str, str]

    async def __aenter__(self) -> Self:
        """Opens its sessions."""
        timeout = aiohttp.ClientTimeout(total=None)
        self._lasting = aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), timeout=timeout)
        # aiohttp repeats a GET whose connection turns out to be closed, which nobody could account
        # for.
        fresh = aiohttp.TCPConnector(limit=0, force_close=True)
        self._fresh = aiohttp.ClientSession(connector=fresh, timeout=timeout)
        narrow = aiohttp.TCPConnector(limit=0, force_close=True, socket_factory=narrow_socket)
        self._narrow = aiohttp.ClientSession(connector=narrow, timeout=timeout, read_bufsize=1024)
        return self

    async def __aexit__(self, *_: object) -> None:
        """Closes them."""
        for session in (self._lasting, self._fresh, self._narrow):
            await session.close()

    async def send(self, plan: Plan) -> Record:
        """One request, to its end."""
        answer = Answer(plan)
        try:
            async with asyncio.timeout(deadline(STUCK_S)):
                if plan.leave in {Leave.UPLOAD, Leave.BEFORE}:
                    end = await self._leave(plan, answer)
                else:
                    end = await self._stay(plan, answer)
        except TimeoutError:
            end = End.STUCK
        except (aiohttp.ClientError, ConnectionError):
            end = End.BROKEN
        return answer.record(end)

    async def _leave(self, plan: Plan, answer: "Answer") -> End:
        """Goes away before the answer has ended, unless that comes first."""
        try:
            async with asyncio.timeout(0.6 + plan.number % 10 / 10):
                return await self._stay(plan, answer)
        except TimeoutError:
            return End.LEFT

    async def _stay(self, plan: Plan, answer: "Answer") -> End:
        session = self._narrow if plan.slow else self._fresh if plan.method == "GET" else self._lasting
        data: Any = half(plan.body) if plan.leave is Leave.UPLOAD else plan.body or None
        url = self.urls[plan.front] + plan.path
        async with session.request(plan.method, url, data=data, headers=plan.headers) as response:
            answer.head(response)
            paused = not plan.slow
            async for piece in response.content.iter_any():
                answer.body += piece
                if plan.leave is Leave.MID and len(answer.body) > 500 + plan.number % 20 * 500:
                    response.close()
                    return End.LEFT
                if plan.slow:
                    await asyncio.sleep(0.002 if paused else PAUSE_S)
                    paused = True
        return End.WHOLE if answer.is_right() else End.WRONG


def narrow_socket(address: Any) -> socket.socket:
    """A socket that takes little at a time."""
    family, kind, protocol, _, _ = address
    made = socket.socket(family, kind, protocol)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    return made


async def half(body: bytes) -> AsyncIterator[bytes]:
    """A body that stops in the middle."""
    yield body[: len(body) // 2]
    await asyncio.Event().wait()


class Answer:
    """What has come of an answer."""

    def __init__(self, plan: Plan) -> None:
        """Nothing yet."""
        self.plan = plan
        self.began = time.monotonic()
        self.body = bytearray()
        self.status: int | None = None
        self.headers: dict[str, str] = {}

    def head(self, response: aiohttp.ClientResponse) -> None:
        """Its head has come."""
        self.status = response.status
        self.headers = {name.lower(): value for name, value in response.headers.items()}

    def is_right(self) -> bool:
        """A whole answer is the one that was asked for."""
        if self.status != 200 or self.plan.method == "GET":
            return True
        if "event-stream" in self.headers.get("content-type", ""):
            if not self.body.endswith(b"data: [DONE]\n\n"):
                return False
            text = b"".join(TEXTS.findall(self.body)).decode()
        else:
            text = json.loads(self.body)["choices"][0].get("text", "")
        return not self.plan.prompt or text == self.plan.text

    def refusal(self) -> str | None:
        """The type of error that the router or the gateway gave, where no engine answered."""
        if self.status is None or self.status < 400 or "x-fake-engine" in self.headers:
            return None
        try:
            return str(json.loads(self.body)["error"]["type"])
        except (ValueError, KeyError, TypeError):
            return "gateway"

    def record(self, end: End) -> Record:
        """What it has come to."""
        told = json.loads(self.headers.get("x-kvcellar-decision", "{}"))
        return Record(
            self.plan.number,
            self.plan.front,
            self.plan.kind,
            end,
            self.status,
            self.refusal(),
            told.get("id"),
            self.headers.get("x-kvcellar-engine"),
            self.headers.get("x-fake-engine"),
            time.monotonic() - self.began,
        )
