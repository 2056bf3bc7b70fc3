"""Concurrent clients of a server: whole answers, aborted streams, and background load."""

import asyncio
import contextlib
import random
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import httpx

from tests.deadlines import deadline, shrunk
from tests.vllm.answers import Answer
from tests.vllm.prompts import prompt
from tests.vllm.server import Server, completion

# Several requests share the engine; see `deadline`.
ANSWER_S = 400.0


async def _answer(client: httpx.AsyncClient, tokens: Sequence[int], max_tokens: int) -> Answer:
    response = await client.post("/v1/completions", json=completion(tokens, max_tokens))
    response.raise_for_status()
    return Answer.of_json(response.json())


async def _all(url: str, prompts: Sequence[Sequence[int]], max_tokens: int) -> list[Answer]:
    async with httpx.AsyncClient(base_url=url, timeout=deadline(ANSWER_S), trust_env=False) as client:
        return list(await asyncio.gather(*(_answer(client, tokens, max_tokens) for tokens in prompts)))


def complete_together(server: Server, prompts: Sequence[Sequence[int]], max_tokens: int) -> list[Answer]:
    """All prompts at once; answers in the order of the prompts."""
    return asyncio.run(_all(server.url, prompts, max_tokens))


async def _abandon(client: httpx.AsyncClient, tokens: Sequence[int], max_tokens: int, delay_s: float) -> bool:
    """Streams a completion and hangs up after `delay_s`, wherever the request is then. True when it had not ended."""
    body = {**completion(tokens, max_tokens), "stream": True}

    async def read() -> None:
        async with client.stream("POST", "/v1/completions", json=body) as response:
            async for _ in response.aiter_bytes():
                pass

    try:
        await asyncio.wait_for(read(), delay_s)
    except TimeoutError:
        return True
    return False


async def _abandon_all(url: str, prompts: Sequence[Sequence[int]], max_tokens: int, delays_s: Sequence[float]) -> int:
    async with httpx.AsyncClient(base_url=url, timeout=deadline(ANSWER_S), trust_env=False) as client:
        pairs = zip(prompts, delays_s, strict=True)
        return sum(await asyncio.gather(*(_abandon(client, tokens, max_tokens, delay_s) for tokens, delay_s in pairs)))


def abandon_together(
    server: Server, prompts: Sequence[Sequence[int]], max_tokens: int, delays_s: Sequence[float]
) -> int:
    """Streams all prompts at once and hangs up on each after its own delay. Returns how many were cut off."""
    return asyncio.run(_abandon_all(server.url, prompts, max_tokens, delays_s))


@dataclass
class Load:
    """Clients that ask again and again until told to stop. Errors are counted: the server may die under them."""

    answers: int = 0
    errors: int = 0
    stop: threading.Event = field(default_factory=threading.Event)

    def run(self, server: Server, rng: random.Random) -> None:
        """One client."""
        with httpx.Client(base_url=server.url, timeout=deadline(ANSWER_S), trust_env=False) as client:
            while not self.stop.is_set():
                tokens = prompt(rng, rng.randint(shrunk(150, 70), shrunk(500, 160)))
                try:
                    client.post("/v1/completions", json=completion(tokens, shrunk(16, 4))).raise_for_status()
                    self.answers += 1
                except httpx.HTTPError:
                    self.errors += 1
                    self.stop.wait(0.2)


@contextlib.contextmanager
def background(server: Server, rng: random.Random, clients: int) -> Iterator[Load]:
    """Keeps a server busy with cold requests."""
    load = Load()
    seeds = [random.Random(rng.random()) for _ in range(clients)]
    threads = [threading.Thread(target=load.run, args=(server, own), daemon=True) for own in seeds]
    for thread in threads:
        thread.start()
    try:
        yield load
    finally:
        load.stop.set()
        for thread in threads:
            thread.join(deadline(ANSWER_S))
