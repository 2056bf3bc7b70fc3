"""Rows of the table from what engines told. Pure: what a figure means is decided here, and nowhere measured."""

import statistics
from collections.abc import Iterator, Sequence
from typing import Any

from gpu_check_lib.cell import SHAPES, Cell
from gpu_check_lib.table import Row, State, goal, passed

Told = Sequence[dict[str, Any]]
OVERHEAD_MAX = 0.01
# A hit costs what its bytes cost on the bus, and what vLLM's own hit costs.
HIT_FACTOR_MAX = 1.1


def correct(cell: Cell, told: Told, why: str | None) -> Row:
    """One row for a cell of `scenarios.correct`. `why`: it did not end well."""
    answers = [one for one in told if "same" in one and "own_cached" in one]
    wrong = sum(not one["same"] for one in answers)
    short = sum(one["cached"] != one["expected"] or one["own_cached"] != one["expected"] for one in answers)
    wanted = len(cell.lengths) * cell.runs
    found = f"{len(answers)} of {wanted} answers, {wrong} wrong, {short} with other hits than expected"
    if answers and all(one["distinct"] == 1 for one in answers):
        found += ", every answer one token over and over: they prove little"
    if why is not None:
        found += f" ({why})"
    return passed(cell.name, found, why is None and len(answers) == wanted and not wrong and not short)


def soak(cell: Cell, told: Told, why: str | None) -> Row:
    """The row of `scenarios.soak`. A miss is no failure: its memory is too small."""
    last = next((one for one in told if "rounds" in one), None)
    if last is None or why is not None:
        return Row(cell.name, why or "it told nothing", State.FAILED)
    found = f"{last['answers']} answers in {last['rounds']} rounds, {last['wrong']} wrong, {last['misses']} misses"
    return passed(cell.name, found, last["wrong"] == 0 and last["rounds"] > 0)


def _times(told: Told) -> Iterator[tuple[int, dict[str, Any]]]:
    for one in told:
        if "ms" in one:
            yield one["length"], one


def speed(cell: Cell, told: Told, why: str | None) -> list[Row]:
    """The rows of one engine of `scenarios.speed`."""
    rows = []
    for length, one in _times(told):
        times = ", ".join(
            f"{name} {ms['median']:.1f} ({ms['min']:.1f}-{ms['max']:.1f})" for name, ms in one["ms"].items()
        )
        rows.append(Row(f"{cell.name}, {length} tokens: TTFT ms", times, State.OK))
        if "tier_hit" in one["ms"]:
            good = one["cached"] == [one["expected"]] and one["same"] == one["runs"]
            found = f"{one['same']} of {one['runs']} the same, cached {one['cached']} of {one['expected']}"
            rows.append(passed(f"{cell.name}, {length} tokens: answers after hits", found, good))
    if why is not None or (not rows and cell.phase != "fill"):
        rows.append(Row(cell.name, why or "it told nothing", State.FAILED))
    return rows


def _median(told: Told, length: int, name: str) -> float | None:
    for tokens, one in _times(told):
        if tokens == length and name in one["ms"]:
            return float(one["ms"][name]["median"])
    return None


def _load_rate(told: Told) -> float | None:
    rates = [one["tokens_per_s"] for one in told if "tokens_per_s" in one]
    return max(rates) if rates else None


def compared(lengths: Sequence[int], shape: str, runs: dict[str, list[Told]], bus_gb_s: float | None) -> list[Row]:
    """Goals across engines of one run: ours beside vLLM's own connector, beside none, and beside the bus.

    Args:
        lengths: of prompts.
        shape: of the model.
        runs: what each phase told, each time it ran.
        bus_gb_s: one contiguous pinned copy to the GPU, measured in this run; none: it was not.
    """
    ours, native = runs.get("ours", [[]])[0], runs.get("native", [[]])[0]
    rows = []
    for length in lengths:
        hit, theirs, own = (
            _median(ours, length, "tier_hit"),
            _median(native, length, "tier_hit"),
            _median(ours, length, "own_hit"),
        )
        if hit is not None and theirs is not None:
            found = f"{hit:.1f} ms, vLLM's {theirs:.1f} ms (goal: not slower)"
            rows.append(goal(f"{length} tokens: hit beside vLLM's own offloading", found, hit <= theirs))
        if hit is not None and own is not None and bus_gb_s:
            most = HIT_FACTOR_MAX * (1e3 * length * SHAPES[shape].token_bytes / (bus_gb_s * 1e9) + own)
            found = f"{hit:.1f} ms (goal: at most {most:.1f} ms, {HIT_FACTOR_MAX} of bus and own hit)"
            rows.append(goal(f"{length} tokens: hit beside the bus", found, hit <= most))
    plain = [rate for told in runs.get("plain", []) if (rate := _load_rate(told)) is not None]
    rate = _load_rate(ours)
    if plain and rate is not None:
        overhead = statistics.mean(plain) / rate - 1
        spread = max(plain) / min(plain) - 1
        apart = f"the {len(plain)} engines without are {spread:.2%} apart"
        found = f"{overhead:.2%} (goal: at most {OVERHEAD_MAX:.0%}; {apart})"
        rows.append(goal("overhead without reuse", found, overhead <= OVERHEAD_MAX))
    return rows


def bus(found: dict[str, Any]) -> list[Row]:
    """A row for each goal of `kvcellar bench dma`."""
    return [goal(one["name"], f"{one['value']:.3f} ({one['goal']})", one["met"]) for one in found["goals"]]


def bus_rate(found: dict[str, Any] | None) -> float | None:
    """GB/s of one copy to the GPU in one piece, over all that the benchmark measured beside its fragments."""
    rates = [
        one["value"]
        for one in (found or {}).get("results", [])
        if one["name"].startswith("to GPU") and one["name"].endswith("the same in one piece")
    ]
    return statistics.median(rates) if rates else None
