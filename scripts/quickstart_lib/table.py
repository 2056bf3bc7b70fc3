"""The result on the terminal."""

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table

from quickstart_lib.measurements import MEANINGS, Measurements


def show(console: Console, measured: Measurements, report: dict[str, Any]) -> None:
    """Times by source, then events by medium, then whether the outputs were the same."""
    show_times(console, measured, MEANINGS)
    console.print()
    console.print(_events(report["events"]))
    ratio = report["working_set_tokens"] / report["gpu_cache_tokens"]
    console.print(
        f"vLLM's KV cache held {report['gpu_cache_tokens']:,} tokens, the conversations "
        f"{report['working_set_tokens']:,} ({ratio:.1f} times as many): "
        f"{measured.gpu_blocks_evicted:,} blocks were evicted from it."
    )
    if report["with_kvcellar"]:
        show_compared(console, measured)
    else:
        console.print("vLLM alone: nothing is kept beyond its own cache, so evicted prompts were computed again.")


def show_compared(console: Console, measured: Measurements) -> None:
    """How many outputs were the same after a hit in a tier as after vLLM's own."""
    equal = measured.pairs_compared - len(measured.differences)
    console.print(
        f"Outputs after hits in a tier against those after GPU hits: {equal} of {measured.pairs_compared} pairs "
        f"identical (text, token ids and {measured.logprobs_compared:,} logprobs, bit for bit)."
    )


def show_times(console: Console, measured: Measurements, meanings: Mapping[str, str]) -> None:
    """Times by source.

    `meanings`: the sources to show, in their order, and what each one means.
    """
    times = Table(title="Time to first token (TTFT)", title_justify="left")
    times.add_column("source", no_wrap=True)
    for name in ("median", "IQR", "n", "prompt", "DRAM", "NVMe"):
        times.add_column(name, justify="right", no_wrap=True)
    shown = {name: measured.sources[name] for name in meanings if name in measured.sources}
    for name, samples in shown.items():
        times.add_row(
            name,
            f"{1000 * samples.median_seconds():.0f} ms",
            f"{1000 * samples.spread_seconds():.0f} ms",
            str(len(samples.ttft_seconds)),
            f"{samples.prompt_tokens:,}",
            f"{samples.hits.dram:,}",
            f"{samples.hits.nvme:,}",
        )
    console.print()
    console.print(times)
    console.print("IQR: interquartile range. Tokens are sums: sent, supplied by each tier.")
    for name in shown:
        console.print(f"  {name}: {meanings[name]}")


def _events(events: dict[str, Any]) -> Table:
    title = f"KV events received: {events['batches']} batches, {events['batches_lost']} lost"
    table = Table(title=title, title_justify="left")
    table.add_column("medium")
    for name in ("BlockStored", "blocks", "BlockRemoved", "blocks"):
        table.add_column(name, justify="right")
    for medium, row in events["by_medium"].items():
        keys = ("events_stored", "blocks_stored", "events_removed", "blocks_removed")
        table.add_row(medium, *(f"{row[key]:,}" for key in keys))
    return table
