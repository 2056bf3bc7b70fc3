"""The comparison: two engines, the router in three ways, one load."""

import time
from pathlib import Path

from rich.console import Console

from quickstart_lib import folders
from quickstart_lib.arguments import MODEL
from quickstart_lib.cache_size import BLOCK_TOKENS
from quickstart_lib.conversations import Writer
from quickstart_lib.fleet import capacity, talks
from quickstart_lib.fleet.arguments import LOG_STEM, FleetArguments
from quickstart_lib.fleet.chat import Chat
from quickstart_lib.fleet.engines import Engines
from quickstart_lib.fleet.measurements import NAMES, WAYS, Played, Sizes, Way
from quickstart_lib.fleet.play import Play
from quickstart_lib.fleet.router import Router
from quickstart_lib.progress import Phase
from quickstart_lib.server import MODEL_NAME

WARM_UP_PROMPTS, WARM_UP_TOKENS = 3, 400


class Comparison:
    """Plays the same conversations in all ways, on the same two engines with emptied caches."""

    def __init__(self, arguments: FleetArguments, console: Console) -> None:
        self._arguments = arguments
        self._console = console
        self._talks = talks.write(arguments)
        self._order = talks.order(arguments)
        self._size = capacity.plan(arguments, MODEL, self._talks)
        self.played = {way.name: Played() for way in WAYS}

    def run(self) -> Sizes:
        """Start the engines and play. Returns how large everything is.

        Raises:
            QuickstartError: an engine or the router failed; with the end of its log.
        """
        console = self._console
        dram_bytes = capacity.dram_bytes(self._arguments, self._size)
        logs = " and ".join(f"{LOG_STEM.name}-{name}.log" for name in NAMES)
        console.print(f"starting two vLLM engines (about a minute); their logs: {logs} in .cache")
        with (
            folders.in_memory("fleet") as work_dir,
            console.status("loading the models") as status,
            Engines(
                MODEL,
                self._size,
                dram_bytes,
                Path(work_dir),
                lambda seconds: status.update(f"loading the models, {seconds:.0f} s"),
            ) as engines,
        ):
            status.stop()
            writer = Writer(MODEL, self._arguments.seed)
            engines.warm_up(
                [writer.opening(f"W{index}", WARM_UP_TOKENS) for index in range(WARM_UP_PROMPTS)],
                self._arguments.output_tokens,
            )
            for number in range(self._arguments.rounds):
                # In turn first, in the middle and last: the machine may become slower or faster
                # meanwhile.
                for index in range(len(WAYS)):
                    self._play(WAYS[(number + index) % len(WAYS)], engines)
            return Sizes(
                engines.kv_cache_tokens(BLOCK_TOKENS),
                dram_bytes // self._size.block_bytes * BLOCK_TOKENS,
                self._size.working_set_tokens,
            )

    def _play(self, way: Way, engines: Engines) -> None:
        arguments, played = self._arguments, self.played[way.name]
        log = LOG_STEM.with_name(f"{LOG_STEM.name}-router-{way.name.replace(' ', '-')}.log")
        with Router(way, arguments.policy, engines.addresses, MODEL, log) as router:
            engines.empty()
            before = engines.dram_hit_tokens()
            play = Play(self._talks, self._order, lambda: Chat(router.port, MODEL_NAME, arguments.output_tokens))
            started = time.monotonic()
            with Phase(self._console, way.name, len(self._order)) as phase:
                play.run(arguments.concurrency, phase.advance)
            played.seconds += time.monotonic() - started
            played.talks.append(play.replies)
            played.dram_tokens += engines.dram_hit_tokens() - before
            for name, value in router.counters().items():
                played.router[name] = played.router.get(name, 0.0) + value
