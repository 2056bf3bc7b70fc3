"""A soak's engines, which come and go: listed or not, draining, dying, frozen, deaf, or saying nonsense."""

import asyncio
import contextlib
import itertools
import json
import signal
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

from tests.vllm.fake import Fake

# So many engines are left in peace, unless all are taken away.
QUIET_MIN = 2


@dataclass
class Fleet:
    """The engines and the file that names them."""

    file: Path
    engines: dict[str, Fake]
    random: Random
    # Events by name.
    happened: Counter[str] = field(default_factory=Counter)
    # Everybody who ever lived, for what they noted.
    seen: set[Path] = field(default_factory=set)
    _draining: set[str] = field(default_factory=set)
    _absent: set[str] = field(default_factory=set)
    _disturbed: set[str] = field(default_factory=set)
    _guests: "itertools.count[int]" = field(default_factory=itertools.count)

    def write(self) -> None:
        """Names those who are there. The file is replaced whole."""
        present = [engine for name, engine in self.engines.items() if name not in self._absent]
        specs = [engine.spec(draining=engine.name in self._draining) for engine in present]
        draft = self.file.with_suffix(".draft")
        draft.write_text(json.dumps(specs))
        draft.replace(self.file)

    def start(self) -> None:
        """Brings all up."""
        for engine in self.engines.values():
            engine.start()
            self.seen.add(engine.seen)
        self.write()

    def close(self) -> None:
        """Ends all."""
        for engine in self.engines.values():
            engine.close()

    async def disturb(self, seconds: float, every_s: float) -> None:
        """Something happens now and then; at the end everything is as at the beginning."""
        events: list[tuple[str, Callable[[Fake], Awaitable[None]]]] = [
            ("killed", self._kill),
            ("left", self._leave),
            ("left and died", self._leave_and_die),
            ("drained", self._drain),
            ("restarted", self._restart),
            ("frozen", self._freeze),
            ("deaf", self._deaf),
            ("sick", self._sick),
            ("lost batches", self._lose),
            ("cleared", self._clear),
        ]
        loop = asyncio.get_running_loop()
        end = loop.time() + seconds
        under_way: list[asyncio.Task[None]] = []
        while loop.time() < end:
            await asyncio.sleep(every_s * self.random.uniform(0.5, 1.5))
            draw = self.random.random()
            if draw < 0.04:
                under_way.append(asyncio.create_task(self._nobody()))
            elif draw < 0.12:
                under_way.append(asyncio.create_task(self._guest()))
            else:
                quiet = sorted(set(self.engines) - self._disturbed)
                if len(quiet) > QUIET_MIN:
                    what, act = self.random.choice(events)
                    under_way.append(asyncio.create_task(self._one(what, self.random.choice(quiet), act)))
        await asyncio.gather(*under_way)

    async def _one(self, what: str, name: str, act: Callable[[Fake], Awaitable[None]]) -> None:
        self.happened[what] += 1
        self._disturbed.add(name)
        try:
            await act(self.engines[name])
        finally:
            self._disturbed.discard(name)

    async def _pause(self) -> None:
        await asyncio.sleep(self.random.uniform(0.3, 4.0))

    async def _kill(self, engine: Fake) -> None:
        await asyncio.to_thread(engine.kill)
        await self._pause()
        await asyncio.to_thread(engine.start)

    async def _restart(self, engine: Fake) -> None:
        await asyncio.to_thread(engine.kill, signal.SIGINT)
        await asyncio.to_thread(engine.start)

    async def _leave(self, engine: Fake) -> None:
        self._absent.add(engine.name)
        self.write()
        await self._pause()
        self._absent.discard(engine.name)
        self.write()

    async def _leave_and_die(self, engine: Fake) -> None:
        self._absent.add(engine.name)
        self.write()
        await asyncio.sleep(0.2)
        await self._kill(engine)
        self._absent.discard(engine.name)
        self.write()

    async def _drain(self, engine: Fake) -> None:
        self._draining.add(engine.name)
        self.write()
        await self._pause()
        self._draining.discard(engine.name)
        self.write()

    async def _freeze(self, engine: Fake) -> None:
        assert engine.process is not None
        engine.process.send_signal(signal.SIGSTOP)
        await self._pause()
        engine.process.send_signal(signal.SIGCONT)

    async def _deaf(self, engine: Fake) -> None:
        await asyncio.to_thread(engine.tell, "/mode", listening=False)
        await self._pause()
        await asyncio.to_thread(engine.tell, "/mode", listening=True)

    async def _sick(self, engine: Fake) -> None:
        await asyncio.to_thread(engine.tell, "/mode", metrics=self.random.choice(["malformed", "hang", "error"]))
        await self._pause()
        await asyncio.to_thread(engine.tell, "/mode", metrics="ok")

    async def _lose(self, engine: Fake) -> None:
        await asyncio.to_thread(engine.tell, "/lose", batches=self.random.randrange(1, 20))

    async def _clear(self, engine: Fake) -> None:
        await asyncio.to_thread(engine.tell, "/clear")

    async def _nobody(self) -> None:
        self.happened["nobody there"] += 1
        before = set(self.engines) - self._absent
        self._absent |= before
        self.write()
        await asyncio.sleep(1.0)
        # Whoever left meanwhile comes back by itself.
        self._absent -= before
        self.write()

    async def _guest(self) -> None:
        """An engine that nobody has heard of comes, and goes for good."""
        self.happened["guest"] += 1
        guest = Fake(f"guest-{next(self._guests)}", self.file.parent)
        self.seen.add(guest.seen)
        await asyncio.to_thread(guest.start)
        self._disturbed.add(guest.name)
        self.engines[guest.name] = guest
        self.write()
        try:
            await asyncio.sleep(self.random.uniform(2.0, 6.0))
        finally:
            del self.engines[guest.name]
            self.write()
            self._disturbed.discard(guest.name)
            await asyncio.sleep(self.random.choice([0.0, 1.0]))
            await asyncio.to_thread(guest.close)


@contextlib.contextmanager
def open_fleet(work_dir: Path, engines: dict[str, Fake]) -> Iterator[Fleet]:
    """Engines that run, and the file that names them."""
    fleet = Fleet(work_dir / "engines.json", engines, Random(1))
    try:
        fleet.start()
        yield fleet
    finally:
        fleet.close()
