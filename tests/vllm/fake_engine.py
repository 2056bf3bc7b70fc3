"""A fake vLLM server: the HTTP interface, metrics, prefix cache and KVEvents that a router sees, and faults on command.

Run as a process of its own, so that it can be killed. What it computes takes time by the tokens that are not cached.
"""

import argparse
import asyncio
import json
import os
import signal
import ssl
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import msgspec
from aiohttp import web

from tests.vllm import fake_answers as answers
from tests.vllm.fake_answers import Asked, Wrong
from tests.vllm.fake_cache import PrefixCache
from tests.vllm.fake_events import Publisher
from tests.vllm.fake_faults import HEADER, ID_HEADER, Fault, Mode
from tests.vllm.fake_metrics import Numbers, Said

BODY_BYTES_MAX = 64 << 20
PREFILL_TOKENS_PER_S = 40_000
STEP_S = 0.004
SLOW_STEP_S = 0.08
SEQUENCES_MAX = 16
RETIRE_STEPS = 40
OTHER_PATHS = (
    "/v1/embeddings",
    "/v1/messages/count_tokens",
    "/rerank",
    "/v1/rerank",
    "/score",
    "/pooling",
    "/classify",
)


class Gone(Exception):
    """The connection was closed on purpose."""


class FakeEngine:
    """One engine."""

    def __init__(self, options: argparse.Namespace) -> None:
        """Opens its sockets for events; HTTP is opened by `serve`."""
        self.options = options
        media = ("GPU", "CPU") if options.host_tier else ("GPU",)
        self.cache = PrefixCache(options.blocks, options.block_tokens, media)
        self.publisher = Publisher(options.events_port, options.replay_port)
        self.numbers = Numbers(options.blocks, options.block_tokens)
        self.mode = Mode()
        self.seats = asyncio.Semaphore(SEQUENCES_MAX)
        # How many prompts it computes at once.
        self.prefill = asyncio.Semaphore(1 if options.one_by_one else SEQUENCES_MAX)
        self.seen = os.open(options.seen, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        self.site: web.TCPSite | None = None
        self.tls: ssl.SSLContext | None = None
        if options.tls:
            self.tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
            self.tls.load_cert_chain(options.tls)
        self.last_body = ""
        self.last_headers: dict[str, list[str]] = {}

    def public(self) -> web.Application:
        """What clients see."""
        app = web.Application(client_max_size=BODY_BYTES_MAX, middlewares=[self.guard])
        app.router.add_get("/health", self.health)
        app.router.add_get("/v1/models", self.models)
        app.router.add_get("/metrics", self.metrics)
        for path, chat in (("/v1/completions", False), ("/v1/chat/completions", True)):
            app.router.add_post(path, self.handler(self.complete, chat=chat))
            app.router.add_post(f"{path}/render", self.handler(self.render, chat=chat))
        for path in ("/v1/messages", "/v1/responses"):
            app.router.add_post(path, self.handler(self.complete, chat=True))
        for path in OTHER_PATHS:
            app.router.add_post(path, self.other)
        app.router.add_post("/tokenize", self.tokenize)
        if not self.options.prefix:
            return app
        whole = web.Application(client_max_size=BODY_BYTES_MAX)
        whole.add_subapp(self.options.prefix, app)
        return whole

    @web.middleware
    async def guard(
        self, request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
    ) -> web.StreamResponse:
        """As vLLM with `--api-key`: everything below /v1 wants it."""
        path = request.path.removeprefix(self.options.prefix)
        given = request.headers.get("authorization")
        if self.options.api_key and path.startswith("/v1") and given != f"Bearer {self.options.api_key}":
            return self.answer({"error": "Unauthorized"}, status=401)
        return await handler(request)

    def private(self) -> web.Application:
        """What the operator of the test sees."""
        app = web.Application(client_max_size=BODY_BYTES_MAX)
        app.router.add_post("/mode", self.set_mode)
        app.router.add_post("/say", self.say)
        app.router.add_post("/lose", self.lose)
        app.router.add_post("/held", self.held)
        app.router.add_post("/clear", self.clear)
        app.router.add_post("/nudge", self.nudge)
        app.router.add_get("/state", self.state)
        return app

    async def serve(self) -> None:
        """Runs until SIGINT. A client that hangs up ends its request."""
        self.public_runner = web.AppRunner(self.public(), handler_cancellation=True, access_log=None)
        private_runner = web.AppRunner(self.private(), access_log=None)
        await self.public_runner.setup()
        await private_runner.setup()
        await self.listen()
        await web.TCPSite(private_runner, "127.0.0.1", self.options.admin_port).start()
        replays = asyncio.create_task(self.publisher.answer_replays())
        told_to_stop = asyncio.Event()
        asyncio.get_running_loop().add_signal_handler(signal.SIGINT, told_to_stop.set)
        await told_to_stop.wait()
        replays.cancel()
        await self.retire()

    async def retire(self) -> None:
        """Ends as a server does that is told to: nobody new, and those that are here as far as they come in a while."""
        self.mode.listening = False
        await self.listen()
        for _ in range(RETIRE_STEPS):
            if not self.numbers.open:
                break
            await asyncio.sleep(0.05)
        os._exit(0)

    async def listen(self) -> None:
        """Accepts connections, or no longer does; those that are open stay."""
        if self.mode.listening and self.site is None:
            self.site = web.TCPSite(self.public_runner, "127.0.0.1", self.options.port, ssl_context=self.tls)
            await self.site.start()
        elif not self.mode.listening and self.site is not None:
            await self.site.stop()
            self.site = None

    def note(self, request: web.Request, what: str) -> None:
        """One line for the test, which survives any death. A router's own requests have no name."""
        if ID_HEADER not in request.headers:
            return
        line = {"engine": self.options.name, "id": request.headers.get(ID_HEADER), "what": what}
        os.write(self.seen, json.dumps(line).encode() + b"\n")

    def handler(
        self, what: Callable[[web.Request, Asked], Awaitable[web.StreamResponse]], *, chat: bool
    ) -> Callable[[web.Request], Awaitable[web.StreamResponse]]:
        """Reads the body first."""

        async def handle(request: web.Request) -> web.StreamResponse:
            self.note(request, "seen")
            try:
                self.last_body = (await request.read()).decode()
                self.last_headers = {name.lower(): request.headers.getall(name) for name in request.headers}
                body = msgspec.json.decode(self.last_body)
                asked = Asked.of(request.path, body, chat=chat)
            except (ValueError, TypeError, AttributeError) as wrong:
                kind = "BadRequestError" if isinstance(wrong, Wrong) else "invalid_request_error"
                return self.answer(answers.error(400, kind, str(wrong)), status=400)
            return await what(request, asked)

        return handle

    def answer(self, value: Any, status: int = 200) -> web.Response:
        """JSON, with this engine's name."""
        return web.json_response(value, status=status, headers={"x-fake-engine": self.options.name})

    async def complete(self, request: web.Request, asked: Asked) -> web.StreamResponse:
        """Both kinds of completions."""
        fault = Fault.of(request.headers.get(HEADER), self.options.name)
        if fault is Fault.NONE:
            fault = self.mode.fault
        if fault is Fault.UNAVAILABLE:
            return self.answer(answers.error(503, "ServiceUnavailable", "as told"), status=503)
        if fault is Fault.ERROR:
            return self.answer(answers.error(500, "InternalServerError", "as told"), status=500)
        if fault is Fault.CLOSE_BEFORE:
            self.close(request)
        if fault is Fault.SILENT_BEFORE:
            await asyncio.Event().wait()
        try:
            with self.numbers.request():
                async with self.seats:
                    response = await self.run(request, asked, fault)
        except (Gone, ConnectionError):
            return web.Response()
        finally:
            self.tell()
        self.note(request, "done")
        return response

    def close(self, request: web.Request) -> None:
        """Hangs up without a word."""
        if request.transport is not None:
            request.transport.abort()
        raise Gone

    def tell(self) -> None:
        """Publishes what has changed in the cache."""
        if events := self.cache.take_events():
            self.publisher.publish(events)

    async def run(self, request: web.Request, asked: Asked, fault: Fault) -> web.StreamResponse:
        """Prefill, then token by token."""
        lease = self.cache.begin(asked.tokens)
        cached = lease.cached_tokens
        self.tell()
        self.numbers.computed(len(asked.tokens), cached)
        text = list(asked.tokens)
        request_id = request.headers.get(ID_HEADER, "0")
        response: web.StreamResponse | None = None
        half = max(1, asked.max_tokens // 2)
        try:
            with self.numbers.running():
                seconds = (len(asked.tokens) - cached) / self.options.prefill_rate
                async with self.prefill:
                    await asyncio.sleep(seconds)
                if asked.stream:
                    response = await self.open_stream(request)
                    for piece in answers.opening(asked, request_id):
                        await response.write(piece)
                for number in range(1, asked.max_tokens + 1):
                    if number > half and fault in {Fault.CLOSE_MID, Fault.SILENT_MID}:
                        await self.break_off(request, response, fault)
                    await asyncio.sleep(SLOW_STEP_S if fault is Fault.SLOW else STEP_S)
                    text.append(answers.next_token(text))
                    if response is not None:
                        last = number == asked.max_tokens
                        await response.write(answers.step(asked, request_id, text[-1], last=last))
            # The last token was never computed as an input.
            self.cache.extend(lease, text[:-1])
            made = text[len(asked.tokens) :]
            if response is None:
                return self.answer(answers.whole(asked, request_id, made, cached))
            for piece in answers.closing(asked, request_id, len(made), cached):
                await response.write(piece)
            await response.write_eof()
            return response
        finally:
            self.cache.end(lease)

    async def open_stream(self, request: web.Request) -> web.StreamResponse:
        """The head of a stream."""
        response = web.StreamResponse(headers={"x-fake-engine": self.options.name})
        response.content_type = "text/event-stream"
        await response.prepare(request)
        return response

    async def break_off(self, request: web.Request, response: web.StreamResponse | None, fault: Fault) -> None:
        """In the middle of an answer: of a whole one, after a part of its announced length."""
        if response is None:
            response = web.StreamResponse(headers={"x-fake-engine": self.options.name, "content-length": "1000"})
            response.content_type = "application/json"
            await response.prepare(request)
            await response.write(b'{"id":')
        if fault is Fault.SILENT_MID:
            await asyncio.Event().wait()
        self.close(request)

    async def render(self, request: web.Request, asked: Asked) -> web.StreamResponse:
        """The ids of a prompt."""
        if self.mode.render == "hang":
            await asyncio.Event().wait()
        return self.answer({"token_ids": asked.tokens})

    async def tokenize(self, request: web.Request) -> web.StreamResponse:
        """The same by the other way to ask, for prompts and for messages."""
        if self.mode.render == "hang":
            await asyncio.Event().wait()
        body = msgspec.json.decode(await request.read())
        tokens = answers.tokens_of(body, chat="messages" in body)
        return self.answer({"count": len(tokens), "max_model_len": answers.MODEL_LEN_MAX, "tokens": tokens})

    async def health(self, request: web.Request) -> web.StreamResponse:
        self.note(request, "seen")
        return web.Response(headers={"x-fake-engine": self.options.name})

    async def models(self, request: web.Request) -> web.StreamResponse:
        self.note(request, "seen")
        return self.answer(answers.models(self.options.model, self.options.adapters.split()))

    async def other(self, request: web.Request) -> web.StreamResponse:
        """What is asked of a model without a prompt."""
        self.note(request, "seen")
        return self.answer({"object": "list", "data": []})

    async def metrics(self, request: web.Request) -> web.StreamResponse:
        if self.mode.metrics == "hang":
            await asyncio.Event().wait()
        if self.mode.metrics == "missing":
            return web.Response(status=404)
        if self.mode.metrics == "error":
            return web.Response(status=500)
        if self.mode.metrics == "malformed":
            return web.Response(body=b"\xff{{vllm:num_requests_running} NaN\nvllm:num_requests_waiting{ -\n" * 50)
        return web.Response(text=self.numbers.text(self.cache.usage))

    async def set_mode(self, request: web.Request) -> web.StreamResponse:
        self.mode = msgspec.convert(await request.json(), Mode)
        await self.listen()
        return web.Response()

    async def say(self, request: web.Request) -> web.StreamResponse:
        self.numbers.said = msgspec.convert(await request.json(), Said)
        return web.Response()

    async def lose(self, request: web.Request) -> web.StreamResponse:
        self.publisher.to_lose = int((await request.json())["batches"])
        return web.Response()

    async def held(self, request: web.Request) -> web.StreamResponse:
        return web.json_response([self.cache.held(tokens) for tokens in await request.json()])

    async def clear(self, request: web.Request) -> web.StreamResponse:
        self.cache.clear()
        self.tell()
        return web.Response()

    async def nudge(self, request: web.Request) -> web.StreamResponse:
        """An empty batch: it shows a subscriber that it lacks the ones before."""
        self.publisher.to_lose = 0
        self.publisher.publish([])
        return web.Response()

    async def state(self, request: web.Request) -> web.StreamResponse:
        last = {"last_body": self.last_body, "last_headers": self.last_headers}
        return web.json_response({**self.numbers.state(), "blocks": len(self.cache), **last})


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--name", required=True)
    parser.add_argument("--model", default=answers.MODEL)
    parser.add_argument("--prefill-rate", type=float, default=PREFILL_TOKENS_PER_S)
    parser.add_argument("--one-by-one", action="store_true")
    parser.add_argument("--host-tier", action="store_true")
    parser.add_argument("--tls", default="")
    parser.add_argument("--prefix", default="")
    parser.add_argument("--api-key", default="")
    parser.add_argument("--adapters", default="")
    for port in ("port", "admin-port", "events-port", "replay-port", "blocks", "block-tokens"):
        parser.add_argument(f"--{port}", type=int, required=True)
    parser.add_argument("--seen", type=Path, required=True)
    return parser.parse_args()


async def main() -> None:
    """Runs one engine until it is killed."""
    started = time.monotonic()
    engine = FakeEngine(parse())
    print(f"{engine.options.name}: sockets after {time.monotonic() - started:.2f} s", flush=True)
    await engine.serve()


if __name__ == "__main__":
    asyncio.run(main())
