"""Runs the comparison, shows and writes what was measured, then judges it."""

from typing import Any

from rich.console import Console

from quickstart_lib.failure import QuickstartError
from quickstart_lib.fleet import chart, report, table
from quickstart_lib.fleet.arguments import LOG_STEM, FleetArguments
from quickstart_lib.fleet.comparison import Comparison
from quickstart_lib.fleet.measurements import PRECISE, ROUND_ROBIN, WAYS, Played, compare_texts

MISMATCHED = "kvcellar_route_prompts_mismatched_total"


def run(arguments: FleetArguments, console: Console) -> None:
    """The whole of `scripts/quickstart --fleet`.

    Raises:
        QuickstartError: something could not be measured, or what was measured is not what the project promises.
    """
    comparison = Comparison(arguments, console)
    sizes = comparison.run()
    played = comparison.played
    result = report.build(arguments, played, compare_texts(played), sizes)
    requests = LOG_STEM.with_suffix(".requests.jsonl")
    report.write(result, arguments.report)
    report.write_requests(played, requests)
    chart.write(played, _footnote(result), arguments.chart)
    table.show(console, result)
    console.print(f"report: {arguments.report}\nchart:  {arguments.chart}\nevery request: {requests}")
    faults = judge(result, played)
    if faults:
        logs = f"the logs of engines and routers: {LOG_STEM}-*.log"
        raise QuickstartError("\n  - ".join(["not everything was shown:", *faults]) + f"\n{logs}")


def judge(result: dict[str, Any], played: dict[str, Played]) -> list[str]:
    """What the run must have shown and has not. Times are not judged: the machine may be busy with something else."""
    engines, ways = result["engines"], result["ways"]
    checks = [
        (
            engines["kv_cache_tokens"] < engines["working_set_tokens"],
            f"vLLM took a KV cache that holds all conversations: {engines['kv_cache_tokens']} tokens",
        ),
        (any(way["dram_tokens"] for way in ways.values()), "no token came from a dram tier"),
        (
            played[PRECISE.name].cached_share > played[ROUND_ROBIN.name].cached_share,
            f"precise routing found {ways[PRECISE.name]['cached_share']:.1%} of the prompts' tokens cached, "
            f"round robin {ways[ROUND_ROBIN.name]['cached_share']:.1%}",
        ),
        (not ways[PRECISE.name]["router"].get(MISMATCHED), "the router's token ids were not vLLM's"),
    ]
    for way in WAYS:
        replies = played[way.name].replies
        strangers = {reply.prefix_from for reply in replies} - {way.prefix_from}
        checks.append((not strangers, f"{way.name}: prefixes were looked up otherwise: {', '.join(sorted(strangers))}"))
        first = [min((talk[0] for talk in talks), key=lambda reply: reply.number) for talks in played[way.name].talks]
        left = max(reply.cached_tokens for reply in first)
        checks.append((left == 0, f"{way.name}: the caches were not empty: the first request found {left} tokens"))
    return [fault for shown, fault in checks if not shown]


def _footnote(result: dict[str, Any]) -> str:
    machine, engines, policy = result["machine"], result["engines"], result["load"]["policy"]
    shares = [engines[key] / engines["working_set_tokens"] for key in ("kv_cache_tokens", "dram_tokens")]
    return (
        f"SmolLM2-135M, vLLM {machine['vllm']}, {machine['cores']} cores ({machine['cpu']}), no GPU, policy {policy}. "
        f"Of all conversations' KV one engine holds {shares[0]:.0%} in its KV cache, {shares[1]:.0%} in its dram tier."
    )
