"""Command line of `scripts/quickstart --fleet`. Standard library only: `--help` works before anything is installed."""

import argparse
from dataclasses import dataclass
from pathlib import Path

from quickstart_lib.arguments import CACHE, add_data_type, add_outputs, check_minima
from quickstart_lib.data_type import DataType, of_this_machine

LOG_STEM = CACHE / "quickstart-fleet"


@dataclass(frozen=True)
class FleetArguments:
    """Checked command line."""

    report: Path
    chart: Path
    conversations: int
    turns: int
    systems: int
    system_sentences: int
    output_tokens: int
    concurrency: int
    kv_cache_share: float
    dram_share: float
    policy: str
    rounds: int
    seed: int
    data_type: DataType


def parse(argv: list[str]) -> FleetArguments:
    """Parse and check; a bad value ends the program with argparse's message."""
    parser = argparse.ArgumentParser(
        prog="scripts/quickstart",
        description="Start two vLLM engines with KV Cellar behind `kvcellar route` and play the same conversations in "
        "three ways, with emptied caches: round robin, approximate, precise. Compares time to first token, cached "
        "tokens and balance. About 5 minutes on two cores.",
    )
    parser.add_argument("--fleet", action="store_true", required=True, help="this comparison")
    add_outputs(parser, "quickstart-fleet")
    parser.add_argument("--conversations", type=int, default=24, help="conversations (default 24)")
    parser.add_argument("--turns", type=int, default=4, help="turns in each conversation (default 4)")
    parser.add_argument("--systems", type=int, default=4, help="system prompts that they share (default 4)")
    parser.add_argument("--system-sentences", type=int, default=14, help="length of each of those (default 14)")
    parser.add_argument("--output-tokens", type=int, default=16, help="tokens generated per request (default 16)")
    parser.add_argument("--concurrency", type=int, default=3, help="requests in flight (default 3)")
    parser.add_argument(
        "--kv-cache-share",
        type=float,
        default=0.25,
        help="share of all conversations' KV that one engine's KV cache holds (default 0.25)",
    )
    parser.add_argument(
        "--dram-share", type=float, default=0.6, help="share that one engine's dram tier holds (default 0.6)"
    )
    parser.add_argument(
        "--policy",
        choices=("cost", "scorers"),
        default="cost",
        help="how approximate and precise weigh engines, as in `kvcellar route` (default cost)",
    )
    parser.add_argument("--rounds", type=int, default=1, help="how often all three ways are played (default 1)")
    parser.add_argument("--seed", type=int, default=7, help="seed of texts and of their order (default 7)")
    add_data_type(parser)
    given = vars(parser.parse_args(argv))
    given.pop("fleet")
    minima = {"conversations": 4, "turns": 2, "systems": 1, "system_sentences": 1, "output_tokens": 1}
    check_minima(parser, given, {**minima, "concurrency": 1, "rounds": 1})
    if given["concurrency"] >= given["conversations"]:
        parser.error("--concurrency must be below --conversations")
    if given["systems"] > given["conversations"]:
        parser.error("--systems must be at most --conversations")
    for name in ("kv_cache_share", "dram_share"):
        if not 0 < given[name] < 1:
            parser.error(f"--{name.replace('_', '-')} must lie between 0 and 1: else routing has nothing to save")
    return FleetArguments(data_type=of_this_machine(given.pop("dtype")), **given)
