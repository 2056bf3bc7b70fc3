"""The comparison on the terminal."""

from typing import Any

from rich.console import Console
from rich.table import Table

from quickstart_lib.fleet.measurements import WAYS


def show(console: Console, report: dict[str, Any]) -> None:
    """One row for each way, then what it means and what it does not."""
    engines, load, texts = report["engines"], report["load"], report["texts"]
    console.print()
    console.print(times(report))
    console.print()
    console.print(tokens(report))
    console.print("IQR: interquartile range. Cached: not computed by any engine, of that from the dram tiers.")
    console.print("Exact: requests whose cached tokens the router knew to the token. Balance: busier / other engine.")
    for way in WAYS:
        console.print(f"  {way.name}: {way.meaning}")
    console.print(f"Approximate and precise weigh engines by `--policy {load['policy']}`.")
    console.print(
        f"All conversations: {engines['working_set_tokens']:,} tokens. Each of the {engines['count']} engines holds "
        f"{engines['kv_cache_tokens']:,} in its KV cache and {engines['dram_tokens']:,} in its dram tier; "
        f"{load['concurrency']} requests in flight."
    )
    console.print(
        f"Texts: {texts['conversations_equal']} of {texts['conversations']} conversations were answered alike every "
        f"time, {texts['first_turns_equal']} in their first turn (batches differ in shape, so last bits may, too)."
    )


def times(report: dict[str, Any]) -> Table:
    """Times to first token."""
    table = Table(title="Two engines behind the router: time to first token", title_justify="left")
    table.add_column("way", no_wrap=True)
    for name in ("p50", "p90", "IQR", "n"):
        table.add_column(name, justify="right", no_wrap=True)
    for name, way in report["ways"].items():
        row = way["ttft_s"]
        table.add_row(name, *(f"{1000 * row[key]:.0f} ms" for key in ("p50", "p90", "spread")), str(row["n"]))
    return table


def tokens(report: dict[str, Any]) -> Table:
    """Where the prompts' tokens came from, and who did the work."""
    table = Table(title="Prompt tokens and balance", title_justify="left")
    table.add_column("way", no_wrap=True)
    for name in ("cached", "dram", "exact", "requests", "computed tokens"):
        table.add_column(name, justify="right", no_wrap=True)
    for name, way in report["ways"].items():
        engines = way["busiest_first"]
        table.add_row(
            name,
            f"{way['cached_share']:.0%}",
            f"{way['dram_tokens'] / way['prompt_tokens']:.0%}",
            f"{way['predicted_exactly'] / way['ttft_s']['n']:.0%}",
            " / ".join(str(it["requests"]) for it in engines),
            " / ".join(f"{it['computed_tokens']:,}" for it in engines),
        )
    return table
