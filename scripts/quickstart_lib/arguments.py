"""Command line of the quickstart. Standard library only: `--help` works before anything is installed."""

import argparse
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quickstart_lib.data_type import BYTES, DataType, of_this_machine

ROOT = Path(__file__).resolve().parents[2]
CACHE = ROOT / ".cache"
MODEL = CACHE / "model" / "smollm2-135m"
SERVER_LOG = CACHE / "quickstart-server.log"
WORKING_SET_RATIO_MIN = 4.0
# In bfloat16: the tiers hold as many tokens in either type.
DRAM_MIB, NVME_MIB = 256, 2048


@dataclass(frozen=True)
class Arguments:
    """Checked command line; lengths are in tokens."""

    report: Path
    chart: Path
    conversations: int
    turns: int
    opening_tokens: int
    output_tokens: int
    probes: int
    probe_tokens: int
    working_set_ratio: float
    dram_size: str
    nvme_size: str
    nvme_dir: Path
    seed: int
    with_kvcellar: bool
    data_type: DataType


def parse(argv: list[str]) -> Arguments:
    """Parse and check; a bad value ends the program with argparse's message."""
    parser = argparse.ArgumentParser(
        prog="scripts/quickstart",
        description="Start vLLM with KV Cellar, play conversations that do not fit its KV cache, and compare the time "
        "to first token and the outputs of cold prompts, GPU-cache hits, DRAM hits and NVMe hits, also after a "
        "restart. About 4 minutes on two cores.",
    )
    add_outputs(parser, "quickstart")
    parser.add_argument("--conversations", type=int, default=12, help="conversations played in turns (default 12)")
    parser.add_argument("--turns", type=int, default=3, help="turns in each conversation (default 3)")
    parser.add_argument("--opening-tokens", type=int, default=480, help="length of each opening prompt (default 480)")
    parser.add_argument("--output-tokens", type=int, default=16, help="tokens generated per request (default 16)")
    parser.add_argument("--probes", type=int, default=10, help="prompts timed from every source (default 10)")
    parser.add_argument("--probe-tokens", type=int, default=1000, help="shortest of these prompts (default 1000)")
    parser.add_argument(
        "--working-set-ratio",
        type=float,
        default=5.0,
        help=f"conversations' KV over vLLM's KV cache (default 5, at least {WORKING_SET_RATIO_MIN:g})",
    )
    for tier, mib in (("dram", DRAM_MIB), ("nvme", NVME_MIB)):
        default = f"default {mib}MiB, twice that in float32"
        parser.add_argument(f"--{tier}-size", help=f"capacity of the {tier.upper()} tier ({default})")
    add_data_type(parser)
    parser.add_argument(
        "--nvme-dir",
        type=Path,
        default=CACHE,
        help="directory on a local disk; the tier takes a folder of its own in it, removed at the end (default .cache)",
    )
    parser.add_argument("--seed", type=int, default=7, help="seed of the synthetic text (default 7)")
    parser.add_argument(
        "--fleet",
        action="store_true",
        help="another comparison: two engines behind the router; its options: scripts/quickstart --fleet --help",
    )
    parser.add_argument(
        "--disaggregated",
        action="store_true",
        help="another comparison: a prefill and a decode engine with NIXL between them; its options: "
        "scripts/quickstart --disaggregated --help",
    )
    parser.add_argument(
        "--without-kvcellar",
        action="store_true",
        help="the same load on vLLM alone, for comparison: what would be a DRAM hit is computed again",
    )
    given = vars(parser.parse_args(argv))
    given.pop("fleet")
    given.pop("disaggregated")
    minima = {"conversations": 2, "turns": 2, "opening_tokens": 64, "output_tokens": 1, "probes": 3, "probe_tokens": 64}
    check_minima(parser, given, minima)
    if given["working_set_ratio"] < WORKING_SET_RATIO_MIN:
        parser.error(f"--working-set-ratio must be at least {WORKING_SET_RATIO_MIN:g}")
    data_type = of_this_machine(given.pop("dtype"))
    for name, mib in (("dram_size", DRAM_MIB), ("nvme_size", NVME_MIB)):
        given[name] = given[name] or f"{data_type.scaled(mib)}MiB"
    return Arguments(with_kvcellar=not given.pop("without_kvcellar"), data_type=data_type, **given)


def add_outputs(parser: argparse.ArgumentParser, name: str) -> None:
    """Add `--report` and `--chart`, which are written under this name unless said otherwise."""
    local = ROOT / "reports" / "local"
    parser.add_argument("--report", type=Path, default=local / f"{name}.json", help="JSON report to write")
    parser.add_argument("--chart", type=Path, default=local / f"{name}.svg", help="chart to write (SVG)")


def check_minima(parser: argparse.ArgumentParser, given: Mapping[str, Any], minima: Mapping[str, int]) -> None:
    """End the program with argparse's message where a value is too small."""
    for name, least in minima.items():
        if given[name] < least:
            parser.error(f"--{name.replace('_', '-')} must be at least {least}")


def add_data_type(parser: argparse.ArgumentParser) -> None:
    """Add `--dtype`, which ends up as a name or None."""
    parser.add_argument(
        "--dtype",
        choices=tuple(BYTES),
        help="what the model is computed in (default: bfloat16 where this processor multiplies it, else float32)",
    )
