"""Plays prompts through both engines, shows and writes what was measured, then judges it."""

import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quickstart_lib import cache_size, chart, folders, machine, report, table
from quickstart_lib.arguments import MODEL
from quickstart_lib.cache_size import BLOCK_TOKENS, NULL_BLOCKS, CacheSize
from quickstart_lib.client import Answer
from quickstart_lib.conversations import Writer
from quickstart_lib.disaggregated.arguments import LOG_STEM, DisaggregatedArguments
from quickstart_lib.disaggregated.engines import Pair, check_nixl, open_pair
from quickstart_lib.failure import QuickstartError
from quickstart_lib.measurements import Measurements
from quickstart_lib.metrics import HitCounter, Metrics
from quickstart_lib.progress import Phase

if TYPE_CHECKING:
    from rich.console import Console

HANDED_OVER = "handed_over"
PREFILL_HIT = "prefill_dram_hit"
ALONE = "decode_alone"
GPU_HIT = "decode_gpu_hit"
DECODE_HIT = "decode_dram_hit"
MEANINGS = {
    HANDED_OVER: "computed by the prefill engine, fetched with NIXL",
    PREFILL_HIT: "in the prefill engine's DRAM tier, fetched with NIXL",
    ALONE: "computed by the decode engine, nobody else asked",
    GPU_HIT: "sent to it again at once: vLLM's own prefix cache",
    DECODE_HIT: "in the decode engine's DRAM tier, nobody else asked",
}
# A vLLM cache that holds so many of the longest prompts.
PROMPTS_HELD = 4
WARM_UP_PROMPTS = 2
EXTERNAL_TOKENS = "vllm:external_prefix_cache_hits_total"


def run(arguments: DisaggregatedArguments, console: "Console") -> None:
    """The whole of `scripts/quickstart --disaggregated`.

    Raises:
        QuickstartError: something could not be measured, or what was measured is not what the project promises.
    """
    check_nixl()
    writer = Writer(MODEL, arguments.seed)
    size = plan(arguments)
    logs = " and ".join(f"{LOG_STEM.name}-{role}.log" for role in ("prefill", "decode"))
    console.print(f"starting a prefill and a decode engine (about a minute); their logs: {logs} in .cache")
    with folders.in_memory("pair") as work_dir, console.status("loading the models") as status:

        def on_wait(seconds: float) -> None:
            status.update(f"loading the models, {seconds:.0f} s")

        with open_pair(size, arguments.dram_size, Path(work_dir), on_wait) as pair:
            status.stop()
            way = HandOver(arguments, pair, console)
            sizes = lengths(arguments)
            way.warm_up([writer.opening(f"W{index}", sizes[0]) for index in range(WARM_UP_PROMPTS)])
            way.play([writer.opening(f"P{index}", length) for index, length in enumerate(sizes)])
            counters = {
                role: Metrics(client.metrics_text()).with_prefix("vllm:kvcellar")
                for role, client in (("prefill", pair.prefill), ("decode", pair.decode))
            }
    result = describe(arguments, way.measured, counters)
    report.write(result, arguments.report)
    title = "Time to first token, prefill and decode in two engines, by where the prompt's KV came from"
    chart.write(way.measured, _footnote(result), arguments.chart, title=title, meanings=MEANINGS)
    table.show_times(console, way.measured, MEANINGS)
    table.show_compared(console, way.measured)
    console.print(f"report: {arguments.report}\nchart:  {arguments.chart}")
    judge(way.measured, way.missed)


def lengths(arguments: DisaggregatedArguments) -> list[int]:
    """Lengths of the prompts: whole blocks and one token more.

    Then every hit, of vLLM, of NIXL and of ours, leaves that one token to compute, and answers compare bit for bit.
    """
    blocks = -(-arguments.probe_tokens // BLOCK_TOKENS)
    return [(blocks + index) * BLOCK_TOKENS + 1 for index in range(arguments.probes)]


def plan(arguments: DisaggregatedArguments) -> CacheSize:
    """Caches that hold some prompts each."""
    longest = max(lengths(arguments)) + arguments.output_tokens
    model_len = -(-longest // BLOCK_TOKENS) * BLOCK_TOKENS
    block_bytes = BLOCK_TOKENS * cache_size.kv_bytes_per_token(MODEL, arguments.data_type.element_bytes)
    blocks = PROMPTS_HELD * model_len // BLOCK_TOKENS + NULL_BLOCKS
    return CacheSize(sum(lengths(arguments)), block_bytes, blocks, model_len, arguments.data_type.name)


class HandOver:
    """Prompts on their ways through both engines."""

    def __init__(self, arguments: DisaggregatedArguments, pair: Pair, console: "Console") -> None:
        self._arguments = arguments
        self._pair = pair
        self._console = console
        self._hits = {
            "prefill": HitCounter(pair.prefill.metrics_text),
            "decode": HitCounter(pair.decode.metrics_text),
        }
        self.measured = Measurements()
        self.missed: list[str] = []

    def warm_up(self, prompts: list[list[int]]) -> None:
        """Unmeasured prompts: the first requests pay for what is made late, and for the engines' getting to know."""
        for prompt in prompts:
            self._through_both(prompt)
            self._forget()
            self._pair.decode.complete(prompt, self._arguments.output_tokens)

    def play(self, prompts: list[list[int]]) -> None:
        """Every prompt from every source."""
        with Phase(self._console, "prompts through both engines", len(prompts)) as phase:
            for index, prompt in enumerate(prompts):
                self._play_one(f"prompt {index}", prompt)
                phase.advance()

    def _play_one(self, name: str, prompt: list[int]) -> None:
        # The decode engine keeps nothing of what it fetched: only what it computed itself.
        self._forget()
        before = self._fetched()
        handed = self._through_both(prompt)
        self.measured.record(HANDED_OVER, prompt, handed)
        self._expect(HANDED_OVER, name, self._fetched() - before, len(prompt) - 1)
        self._forget()
        self._hits["prefill"].mark()
        before = self._fetched()
        loaded = self._through_both(prompt)
        self._expect(PREFILL_HIT, name, self._fetched() - before, len(prompt) - 1)
        hits = self._hits["prefill"].tokens_since_last()
        self.measured.record(PREFILL_HIT, prompt, loaded, hits)
        self._expect(PREFILL_HIT, name, hits.dram, len(prompt) - 1)
        self._forget()
        self._alone(ALONE, prompt)
        reference = self._alone(GPU_HIT, prompt)
        self._forget()
        self._hits["decode"].mark()
        kept = self._pair.decode.complete(prompt, self._arguments.output_tokens)
        hits = self._hits["decode"].tokens_since_last()
        self.measured.record(DECODE_HIT, prompt, kept, hits)
        self._expect(DECODE_HIT, name, hits.dram, len(prompt) - 1)
        for source, answer in ((HANDED_OVER, handed), (PREFILL_HIT, loaded), (DECODE_HIT, kept)):
            self.measured.compare(f"{name}, {source}", reference, answer)

    def _alone(self, source: str, prompt: list[int]) -> Answer:
        answer = self._pair.decode.complete(prompt, self._arguments.output_tokens)
        self.measured.record(source, prompt, answer)
        return answer

    def _through_both(self, prompt: list[int]) -> Answer:
        """As a router in front of both does it: one token there, then all of them here, with what came back."""
        started = time.perf_counter()
        params = self._pair.prefill.hand_over(prompt)
        before = time.perf_counter() - started
        answer = self._pair.decode.complete(prompt, self._arguments.output_tokens, params)
        return replace(answer, ttft_seconds=before + answer.ttft_seconds)

    def _fetched(self) -> int:
        """Tokens that the decode engine got from anybody. Its answers count what the prefill engine had cached."""
        return int(Metrics(self._pair.decode.metrics_text()).total(EXTERNAL_TOKENS))

    def _expect(self, source: str, name: str, tokens: int, least: int) -> None:
        if tokens < least:
            self.missed.append(f"{name}, {source}: {tokens} tokens instead of {least}")

    def _forget(self) -> None:
        for client in (self._pair.decode, self._pair.prefill):
            client.reset_prefix_cache()


def describe(
    arguments: DisaggregatedArguments, measured: Measurements, counters: dict[str, dict[str, float]]
) -> dict[str, Any]:
    """The report as plain data. Times in seconds; spread is the interquartile range."""
    return {
        "commit": machine.commit(),
        "machine": machine.describe(),
        "outputs_identical": measured.outputs_identical,
        "pairs_compared": measured.pairs_compared,
        "differences": measured.differences,
        "tokens": {
            name: {"prompt": it.prompt_tokens, "cached": it.cached_tokens, "dram": it.hits.dram}
            for name, it in measured.sources.items()
        },
        "counters": counters,
        "load": {
            "probes": arguments.probes,
            "probe_tokens": arguments.probe_tokens,
            "output_tokens": arguments.output_tokens,
            "dram_size": arguments.dram_size,
            "seed": arguments.seed,
            "dtype": arguments.data_type.name,
        },
        "results": [
            {
                "name": f"ttft_{name}",
                "value": it.median_seconds(),
                "unit": "s",
                "spread": it.spread_seconds(),
                "n": len(it.ttft_seconds),
            }
            for name, it in measured.sources.items()
        ],
    }


def judge(measured: Measurements, missed: list[str]) -> None:
    """Check what the run must have shown. Times are not judged: the machine may be busy with something else.

    Raises:
        QuickstartError: names everything that was not shown.
    """
    faults = []
    if missed:
        faults.append("tokens that were due did not come: " + "; ".join(missed[:3]))
    if not measured.outputs_identical:
        faults.append("outputs differ: " + "; ".join(measured.differences[:2]))
    if faults:
        raise QuickstartError("\n  - ".join(["not everything was shown:", *faults]))


def _footnote(result: dict[str, Any]) -> str:
    facts, dtype = result["machine"], result["load"]["dtype"]
    return (
        f"SmolLM2-135M in {dtype}, vLLM {facts['vllm']} on {facts['cores']} cores ({facts['cpu']}), no GPU; "
        "two engines share these cores, NIXL over loopback"
    )
