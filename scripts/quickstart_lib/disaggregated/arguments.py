"""Command line of `scripts/quickstart --disaggregated`. Standard library only, as all of them."""

import argparse
from dataclasses import dataclass
from pathlib import Path

from quickstart_lib.arguments import CACHE, add_data_type, add_outputs, check_minima
from quickstart_lib.data_type import DataType, of_this_machine

LOG_STEM = CACHE / "quickstart-disaggregated"
DRAM_MIB = 512


@dataclass(frozen=True)
class DisaggregatedArguments:
    """Checked command line; lengths are in tokens."""

    report: Path
    chart: Path
    probes: int
    probe_tokens: int
    output_tokens: int
    dram_size: str
    seed: int
    data_type: DataType


def parse(argv: list[str]) -> DisaggregatedArguments:
    """Parse and check; a bad value ends the program with argparse's message."""
    parser = argparse.ArgumentParser(
        prog="scripts/quickstart",
        description="Start a prefill and a decode engine of vLLM that hand KV over with NIXL, each with KV Cellar "
        "beside it, and compare the time to first token and the outputs of prompts by where their KV came from. "
        "About 3 minutes on two cores.",
    )
    parser.add_argument("--disaggregated", action="store_true", help=argparse.SUPPRESS)
    add_outputs(parser, "quickstart-disaggregated")
    parser.add_argument("--probes", type=int, default=8, help="prompts timed from every source (default 8)")
    parser.add_argument("--probe-tokens", type=int, default=1000, help="shortest of these prompts (default 1000)")
    parser.add_argument("--output-tokens", type=int, default=16, help="tokens generated per request (default 16)")
    parser.add_argument("--dram-size", help=f"DRAM tier of each engine (default {DRAM_MIB}MiB, twice that in float32)")
    parser.add_argument("--seed", type=int, default=7, help="seed of the synthetic text (default 7)")
    add_data_type(parser)
    given = vars(parser.parse_args(argv))
    given.pop("disaggregated")
    check_minima(parser, given, {"probes": 3, "probe_tokens": 64, "output_tokens": 1})
    data_type = of_this_machine(given.pop("dtype"))
    given["dram_size"] = given["dram_size"] or f"{data_type.scaled(DRAM_MIB)}MiB"
    return DisaggregatedArguments(data_type=data_type, **given)
