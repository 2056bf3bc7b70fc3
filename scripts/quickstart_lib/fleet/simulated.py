"""The chart of `kvcellar bench fleet`: times to first token and balance of every way, by load and size of fleet."""

import json
import sys
from math import log10
from pathlib import Path
from typing import Any

from quickstart_lib import svg

LEFT, TOP = 112, 96
PANEL_WIDTH, PANEL_HEIGHT = 400, 196
TIMES_WIDTH, BALANCE_LEFT, BALANCE_WIDTH = 250, 296, 62
ROW_HEIGHT = 23
BOTTOM = 40
FIRST_S, LAST_S = 0.05, 200.0
BALANCE_MAX = 2.0
OTHER_COLOUR, COST_COLOUR = "#8a8f98", "#1f9d6b"


def write(report: dict[str, Any], path: Path) -> None:
    """Write the chart: a row of panels for each load, a column for each size."""
    # Those that are not as simple are in the report's table.
    rows = [row for row in report["rows"] if not row["scene"]]
    loads = list(dict.fromkeys(row["load"] for row in rows))
    sizes = list(dict.fromkeys(row["engines"] for row in rows))
    width, height = LEFT + PANEL_WIDTH * len(sizes), TOP + PANEL_HEIGHT * len(loads) + BOTTOM
    parts = [
        svg.text(24, 32, "Simulated fleets: time to first token and balance, by way of routing", size=18, weight=600),
        svg.text(
            24,
            54,
            "Dot and number: p90, seconds, logarithmic. Line: p50 to p99. Bar: busiest engine's work over the mean.",
            colour=svg.QUIET,
        ),
    ]
    for down, load in enumerate(loads):
        for across, size in enumerate(sizes):
            here = [row for row in rows if (row["load"], row["engines"]) == (load, size)]
            left, top = LEFT + PANEL_WIDTH * across, TOP + PANEL_HEIGHT * down
            parts += _panel(left, top, f"{load}, {size} engines", here, named=across == 0)
    told = report["parameters"]
    seeds = len(told["seeds"])
    footnote = (
        f"Medians over {seeds} seeds; {told['seconds']:g} s simulated after "
        f"{told['warm_s']:g} s of warming up. kvcellar bench fleet, {report['commit']}."
    )
    parts.append(svg.text(24, height - 14, footnote, size=11, colour=svg.QUIET))
    path.write_text(svg.document(width, height, parts))


def _panel(left: float, top: float, title: str, rows: list[dict[str, Any]], *, named: bool) -> list[str]:
    bottom = top + 16 + ROW_HEIGHT * len(rows)
    parts = [svg.text(left, top, title, weight=600)]
    for tick in (0.1, 1.0, 10.0, 100.0):
        x = _x(left, tick)
        parts.append(svg.line(x, top + 12, x, bottom, colour=svg.GRID, width=1))
        parts.append(svg.text(x, bottom + 13, f"{tick:g} s", anchor="middle", size=10, colour=svg.QUIET))
    for value in (1.0, BALANCE_MAX):
        x = _balance_x(left, value)
        parts.append(svg.line(x, top + 12, x, bottom, colour=svg.GRID, width=1))
        parts.append(svg.text(x, bottom + 13, f"x{value:g}", anchor="middle", size=10, colour=svg.QUIET))
    for index, row in enumerate(rows):
        parts += _row(left, top + 16 + ROW_HEIGHT * (index + 0.5), row, named=named)
    return parts


def _row(left: float, middle: float, row: dict[str, Any], *, named: bool) -> list[str]:
    colour = COST_COLOUR if row["way"] == "cost model" else OTHER_COLOUR
    weight = 600 if colour == COST_COLOUR else 400
    p50, p90, p99 = (_x(left, row[f"ttft_{name}_s"]["median"]) for name in ("p50", "p90", "p99"))
    balance = row["imbalance"]["median"]
    bar_left = _balance_x(left, 1.0)
    bar_width = max(_balance_x(left, min(balance, BALANCE_MAX)) - bar_left, 1.0)
    number = row["ttft_p90_s"]["median"]
    label = f"{number:.0f}" if number >= 10 else f"{number:.2f}"
    parts = [
        svg.line(p50, middle, p99, middle, colour=colour, width=3),
        f'<circle cx="{p90:.1f}" cy="{middle:.1f}" r="5" fill="{colour}"/>',
        svg.text(p99 + 7, middle + 4, label, size=11, weight=weight),
        svg.bar(bar_left, middle, bar_width, 11, colour),
        svg.text(bar_left + bar_width + 4, middle + 4, f"{balance:.2f}", size=10, colour=svg.QUIET),
    ]
    if named:
        parts.append(svg.text(left - 10, middle + 4, row["way"], anchor="end", size=12, weight=weight))
    return parts


def _x(left: float, seconds: float) -> float:
    """Where a time lies: every ten times as long as far to the right."""
    share = log10(min(max(seconds, FIRST_S), LAST_S) / FIRST_S) / log10(LAST_S / FIRST_S)
    return left + TIMES_WIDTH * share


def _balance_x(left: float, value: float) -> float:
    return left + BALANCE_LEFT + BALANCE_WIDTH * (value - 1.0) / (BALANCE_MAX - 1.0)


if __name__ == "__main__":
    write(json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2]))
