"""A soak of the router: rounds of load while engines come and go, and at rest after each an audit of everything."""

import asyncio
import contextlib
import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from random import Random
from typing import Any

from tests.deadlines import deadline
from tests.vllm.metrics import Snapshot
from tests.vllm.router import Router
from tests.vllm.soak_books import Books, between
from tests.vllm.soak_client import Client, End, Record
from tests.vllm.soak_fleet import Fleet
from tests.vllm.soak_growth import Growth
from tests.vllm.soak_plan import Planner

OPEN_MAX = 32
# On a good machine; see `deadline`.
REST_S = 60.0
# Longer than a decision's expectation lasts.
EXPECTATION_S = 2.2


async def wait_for(done: Callable[[], object], what: str) -> None:
    """Polls until `done`, without holding up others; the deadline only turns a hang into a failure."""
    patience_s = deadline(REST_S)
    end = time.monotonic() + patience_s
    while not await asyncio.to_thread(done):
        if time.monotonic() > end:
            raise AssertionError(f"{what}: not within {patience_s:.0f} s")
        await asyncio.sleep(0.1)


@dataclass
class Campaign:
    """One soak. What does not add up is in `problems`."""

    router: Router
    gateway_url: str
    fleet: Fleet
    random: Random
    growth: Growth
    rate: float
    disturb_every_s: float
    # Before an audit: longer than expectations last.
    rest_s: float
    books: Books = field(default_factory=Books)
    problems: list[str] = field(default_factory=list)

    async def run(self, rounds: int, round_s: float) -> None:
        """Everything, until the first round that does not add up."""
        planner = Planner(self.random, tuple(self.fleet.engines))
        watch = asyncio.create_task(self.growth.watch())
        try:
            await asyncio.to_thread(self.router.wait_engines, len(self.fleet.engines))
            for number in range(rounds):
                async with Client({"proxy": self.router.http, "envoy": self.gateway_url}) as client:
                    await asyncio.gather(self._load(planner, client, round_s), self._disturb(round_s))
                await self._audit(planner)
                print(f"round {number + 1}: {len(self.books.records)} requests, {self.growth.at_rest[-1]}", flush=True)
                if self.problems:
                    return
            self.problems += self.growth.problems()
        finally:
            watch.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await watch

    async def _disturb(self, seconds: float) -> None:
        await self.fleet.disturb(seconds, self.disturb_every_s)

    async def _load(self, planner: Planner, client: Client, seconds: float) -> None:
        """Requests at a rate, not more than a bound at once."""
        seats = asyncio.Semaphore(OPEN_MAX)
        sent: set[asyncio.Task[None]] = set()
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            await asyncio.sleep(self.random.expovariate(self.rate))
            await seats.acquire()
            task = asyncio.create_task(self._send(planner, client, seats))
            sent.add(task)
            task.add_done_callback(sent.discard)
        await asyncio.gather(*sent)

    async def _send(self, planner: Planner, client: Client, seats: asyncio.Semaphore) -> None:
        try:
            self.books.records.append(await client.send(planner.next()))
        finally:
            seats.release()

    def counted(self) -> Snapshot:
        """The router's numbers."""
        return Snapshot.of_text(self.router.admin.get("/metrics").text)

    async def _audit(self, planner: Planner) -> None:
        """At rest nothing is open anywhere, the books add up, and the index is right."""
        engines = self.fleet.engines
        await asyncio.to_thread(self.router.wait_engines, len(engines))
        await wait_for(self._is_at_rest, "the end of all requests")
        for engine in engines.values():
            await wait_for(engine.is_idle, f"the end of requests in {engine.name}")
            await asyncio.to_thread(engine.tell, "/nudge")
        await asyncio.sleep(self.rest_s)
        self.growth.rest()
        self.problems += self.books.problems(self.counted(), self.fleet.seen)
        self.problems += await self._index(planner)
        self.problems += self._log()

    def _log(self) -> list[str]:
        """No panic, every retry was said, and every prompt had as many tokens as were predicted exactly."""
        log, counted = self.router.log.read_text(errors="replace"), self.counted()
        found = [line for line in log.splitlines() if "panicked" in line]
        said = log.count("trying another engine")
        found += between("retries", counted.value("kvcellar_route_requests_retried_total"), said, said)
        return found + between("mismatched prompts", counted.value("kvcellar_route_prompts_mismatched_total"), 0, 0)

    def _is_at_rest(self) -> bool:
        counted = self.counted()
        open_now = [counted.value(f"kvcellar_route_engine_in_flight{what}") for what in ("", "_tokens")]
        ended = counted.value("kvcellar_route_requests_total") == counted.value("kvcellar_route_decide_seconds_count")
        return not any(open_now) and ended

    async def _index(self, planner: Planner) -> list[str]:
        """What the index has of every engine is what the engine has."""
        end = time.monotonic() + deadline(REST_S)
        while True:
            wrong = await asyncio.to_thread(self._compare, planner)
            if not wrong or time.monotonic() > end:
                return wrong
            await asyncio.sleep(EXPECTATION_S)

    def _compare(self, planner: Planner) -> list[str]:
        """One prompt of every family: prompts that share nothing, as the router expects what it has just decided.

        The engines are told to fail, so that no cache changes.
        """
        plans = [planner.probe(prompt) for prompt in planner.latest.values()]
        truth = {name: engine.held([plan.prompt for plan in plans]) for name, engine in self.fleet.engines.items()}
        wrong = []
        for at, plan in enumerate(plans):
            response = self.router.client.post(plan.path, content=plan.body, headers=plan.headers)
            decision: dict[str, Any] = json.loads(response.headers["x-kvcellar-decision"])
            engine = response.headers.get("x-fake-engine")
            record = Record(plan.number, plan.front, plan.kind, End.WHOLE, response.status_code, None, decision["id"])
            self.books.records.append(replace(record, engine=engine, chosen=decision["engine"]))
            told = {row["engine"]: row["held_tokens"] for row in decision["considered"]}
            held = {name: found[at] for name, found in truth.items()}
            if told != held:
                wrong.append(f"of {len(plan.prompt)} tokens engines hold {held}, the index says {told}")
        return wrong
