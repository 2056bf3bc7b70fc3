"""The JSON report of the comparison: its own fields, and the `results` and `goals` every report of this project has."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from quickstart_lib import machine
from quickstart_lib.fleet.arguments import FleetArguments
from quickstart_lib.fleet.measurements import APPROXIMATE, NAMES, PRECISE, ROUND_ROBIN, Played, Sizes, Texts

PRECISION_GOAL = 0.99
# Of two engines: half of the work each would be 0.5.
BUSIEST_SHARE_GOAL = 0.65


def build(arguments: FleetArguments, played: dict[str, Played], texts: Texts, sizes: Sizes) -> dict[str, Any]:
    """The report as plain data. Times in seconds; spread is the interquartile range."""
    ways = {name: _way(it) for name, it in played.items()}
    names = ("conversations", "turns", "systems", "output_tokens", "concurrency", "policy", "rounds", "seed")
    return {
        "commit": machine.commit(),
        "machine": machine.describe(),
        "load": {name: getattr(arguments, name) for name in names} | {"dtype": arguments.data_type.name},
        "engines": {"count": len(NAMES), **asdict(sizes)},
        "ways": ways,
        "texts": asdict(texts),
        "results": [result for name, way in ways.items() for result in _results(name, way)],
        "goals": _goals(played),
    }


def write(report: dict[str, Any], path: Path) -> None:
    """Write the report, making its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=2) + "\n")


def write_requests(played: dict[str, Played], path: Path) -> None:
    """Write every request as one line of JSON, for a closer look."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as out:
        for way, it in played.items():
            for number, talks in enumerate(it.talks):
                for talk, replies in enumerate(talks):
                    for turn, reply in enumerate(replies):
                        place = {"way": way, "round": number, "talk": talk, "turn": turn}
                        out.write(json.dumps(place | asdict(reply)) + "\n")


def _way(played: Played) -> dict[str, Any]:
    requests, computed = played.requests(), played.computed_tokens()
    return {
        "ttft_s": _times(played),
        "ttft_s_by_round": [_times(Played([talks])) for talks in played.talks],
        "prompt_tokens": played.prompt_tokens,
        "cached_tokens": played.cached_tokens,
        "cached_share": played.cached_share,
        "cached_share_by_round": [Played([talks]).cached_share for talks in played.talks],
        "dram_tokens": played.dram_tokens,
        "engines": {name: {"requests": requests[name], "computed_tokens": computed[name]} for name in NAMES},
        "busiest_first": [asdict(share) for share in played.balance()],
        "predicted_exactly": played.predicted_exactly(),
        "seconds": played.seconds,
        "router": dict(sorted(played.router.items())),
    }


def _times(played: Played) -> dict[str, Any]:
    return {
        "p50": played.percentile_seconds(50),
        "p90": played.percentile_seconds(90),
        "spread": played.spread_seconds(),
        "n": len(played.ttft_seconds),
    }


def _results(name: str, way: dict[str, Any]) -> list[dict[str, Any]]:
    times, key = way["ttft_s"], name.replace(" ", "_")
    common = {"spread": times["spread"], "n": times["n"]}
    return [
        *({"name": f"ttft_{at}_{key}", "value": times[at], "unit": "s", **common} for at in ("p50", "p90")),
        {"name": f"cached_share_{key}", "value": way["cached_share"], "unit": "share", "n": times["n"]},
    ]


def _goals(played: dict[str, Played]) -> list[dict[str, Any]]:
    precise = played[PRECISE.name]
    checks = []
    for other in (ROUND_ROBIN, APPROXIMATE):
        than, key = played[other.name], other.name.replace(" ", "_")
        share = precise.cached_share / than.cached_share if than.cached_share else None
        checks.append((f"precise_cached_share_over_{key}", ">= 1", share, share is None or share >= 1))
        for percent in (50, 90):
            ratio = precise.percentile_seconds(percent) / than.percentile_seconds(percent)
            checks.append((f"precise_ttft_p{percent}_over_{key}", "<= 1", ratio, ratio <= 1))
    exact = precise.predicted_exactly() / len(precise.replies)
    checks.append(("precise_predictions_exact", f">= {PRECISION_GOAL}", exact, exact >= PRECISION_GOAL))
    computed = [share.computed_tokens for share in precise.balance()]
    busiest = computed[0] / max(1, sum(computed))
    most = f"<= {BUSIEST_SHARE_GOAL}"
    checks.append(("precise_busier_engines_share_of_computing", most, busiest, busiest <= BUSIEST_SHARE_GOAL))
    return [{"name": name, "goal": goal, "value": value, "met": met} for name, goal, value, met in checks]
