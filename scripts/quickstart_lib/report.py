"""The JSON report: the quickstart's own fields, and the `results` and `goals` every report of this project has."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quickstart_lib import machine
from quickstart_lib import measurements as sources
from quickstart_lib.arguments import Arguments
from quickstart_lib.measurements import Measurements


@dataclass(frozen=True)
class CacheFacts:
    """Sizes as the engine reported them, in tokens."""

    gpu_cache_tokens: int
    working_set_tokens: int

    @property
    def ratio(self) -> float:
        """Working set over vLLM's KV cache."""
        return self.working_set_tokens / self.gpu_cache_tokens


def build(
    arguments: Arguments,
    measured: Measurements,
    events: dict[str, Any],
    facts: CacheFacts,
    counters: list[dict[str, float]],
) -> dict[str, Any]:
    """The report as plain data. Times in seconds; spread is the interquartile range."""
    ttft = {
        name: {"median": samples.median_seconds(), "spread": samples.spread_seconds(), "n": len(samples.ttft_seconds)}
        for name, samples in measured.sources.items()
    }
    tokens = {
        name: {
            "prompt": samples.prompt_tokens,
            "cached": samples.cached_tokens,
            "dram": samples.hits.dram,
            "nvme": samples.hits.nvme,
        }
        for name, samples in measured.sources.items()
    }
    return {
        "commit": machine.commit(),
        "machine": machine.describe(),
        "with_kvcellar": arguments.with_kvcellar,
        "outputs_identical": measured.outputs_identical if arguments.with_kvcellar else None,
        "pairs_compared": measured.pairs_compared,
        "logprobs_compared": measured.logprobs_compared,
        "differences": measured.differences,
        "dram_hit_tokens": measured.hits.dram,
        "nvme_hit_tokens": measured.hits.nvme,
        "ttft_s": ttft,
        "ttft_spread": "interquartile range",
        "tokens": tokens,
        "events": events,
        "gpu_blocks_evicted": measured.gpu_blocks_evicted,
        "gpu_cache_tokens": facts.gpu_cache_tokens,
        "working_set_tokens": facts.working_set_tokens,
        "counters": counters[0],
        "counters_after_restart": counters[1] if len(counters) > 1 else None,
        "load": _load(arguments),
        "results": [
            {"name": f"ttft_{name}", "value": row["median"], "unit": "s", "spread": row["spread"], "n": row["n"]}
            for name, row in ttft.items()
        ],
        "goals": _goals(measured, events, facts) if arguments.with_kvcellar else [],
    }


def write(report: dict[str, Any], path: Path) -> None:
    """Write the report, making its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=2) + "\n")


def _load(arguments: Arguments) -> dict[str, Any]:
    names = (
        "conversations",
        "turns",
        "opening_tokens",
        "output_tokens",
        "probes",
        "probe_tokens",
        "dram_size",
        "nvme_size",
        "seed",
    )
    return {name: getattr(arguments, name) for name in names} | {"dtype": arguments.data_type.name}


def _goals(measured: Measurements, events: dict[str, Any], facts: CacheFacts) -> list[dict[str, Any]]:
    pairs_equal = measured.pairs_compared - len(measured.differences)
    cpu_stored = events["by_medium"].get("CPU", {}).get("events_stored", 0)
    disk_stored = events["by_medium"].get("STORAGE", {}).get("events_stored", 0)

    def share_of_cold(source: str) -> float | None:
        cold, hit = measured.sources.get(sources.COLD), measured.sources.get(source)
        return hit.median_seconds() / cold.median_seconds() if cold and hit else None

    shares = {source: share_of_cold(source) for source in (sources.DRAM_HIT, sources.NVME_HIT, sources.RESTART_HIT)}
    checks = (
        ("identical_pairs", f"{measured.pairs_compared}", pairs_equal, measured.outputs_identical),
        ("dram_hit_tokens", "> 0", measured.hits.dram, measured.hits.dram > 0),
        ("nvme_hit_tokens", "> 0", measured.hits.nvme, measured.hits.nvme > 0),
        ("expected_hits_missed", "0", len(measured.empty_hits), not measured.empty_hits),
        ("cpu_block_stored_events", "> 0", cpu_stored, cpu_stored > 0),
        ("storage_block_stored_events", "> 0", disk_stored, disk_stored > 0),
        ("working_set_over_gpu_cache", ">= 4", facts.ratio, facts.ratio >= 4),
        *(
            (f"{source}_ttft_over_cold_ttft", "< 1", share, share is not None and share < 1)
            for source, share in shares.items()
        ),
    )
    return [{"name": name, "goal": goal, "value": value, "met": met} for name, goal, value, met in checks]
