"""The chart: one row per source with every sample, the median and the interquartile range. Plain SVG, no dependency."""

import math
import statistics
from html import escape
from pathlib import Path

from quickstart_lib.measurements import MEANINGS, Measurements, Samples

WIDTH = 920
LEFT = 380
RIGHT = 100
TOP = 78
ROW_HEIGHT = 46
BAR_HEIGHT = 20
BOTTOM = 56
TICKS_WANTED = 5
COMPUTED_COLOUR, GPU_COLOUR, DRAM_COLOUR, NVME_COLOUR = "#8a8f98", "#5b8def", "#1f9d6b", "#d9822b"


def write(measured: Measurements, footnote: str, path: Path) -> None:
    """Write the chart; the axis starts at zero and is in milliseconds."""
    rows = [(name, measured.sources[name]) for name in MEANINGS if name in measured.sources]
    longest_ms = 1000 * max(max(samples.ttft_seconds) for _, samples in rows)
    step_ms = _tick_step(longest_ms / TICKS_WANTED)
    end_ms = math.ceil(longest_ms / step_ms) * step_ms
    height = TOP + ROW_HEIGHT * len(rows) + BOTTOM
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}" '
        'font-family="system-ui, DejaVu Sans, Arial, sans-serif" font-size="13" fill="#1c1f24">',
        f'<rect width="{WIDTH}" height="{height}" fill="#ffffff"/>',
        _text(24, 32, "Time to first token, by where the prompt's KV came from", size=18, weight=600),
        _text(
            24,
            54,
            "Bar: median. Line: interquartile range. Dots: every request. "
            "Grey: computed. Blue: GPU hit. Green: DRAM. Orange: NVMe.",
            colour="#5c636e",
        ),
        *_axis(end_ms, step_ms, len(rows)),
    ]
    for index, (name, samples) in enumerate(rows):
        parts += _row(TOP + ROW_HEIGHT * index, name, samples, end_ms)
    parts += [_text(24, height - 14, footnote, size=11, colour="#5c636e"), "</svg>"]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(parts) + "\n")


def _tick_step(wanted: float) -> float:
    power = 10 ** math.floor(math.log10(wanted))
    return float(next(factor * power for factor in (1, 2, 5, 10) if factor * power >= wanted))


def _x(value_ms: float, end_ms: float) -> float:
    return LEFT + (WIDTH - LEFT - RIGHT) * value_ms / end_ms


def _axis(end_ms: float, step_ms: float, rows: int) -> list[str]:
    bottom = TOP + ROW_HEIGHT * rows
    parts = []
    for index in range(round(end_ms / step_ms) + 1):
        x = _x(index * step_ms, end_ms)
        parts.append(f'<line x1="{x:.1f}" y1="{TOP}" x2="{x:.1f}" y2="{bottom}" stroke="#e3e6ea"/>')
        parts.append(_text(x, bottom + 18, f"{index * step_ms:g} ms", anchor="middle", size=11, colour="#5c636e"))
    return parts


def _colour(samples: Samples) -> str:
    if samples.hits:
        return NVME_COLOUR if samples.hits.nvme > samples.hits.dram else DRAM_COLOUR
    return GPU_COLOUR if samples.cached_tokens else COMPUTED_COLOUR


def _row(top: float, name: str, samples: Samples, end_ms: float) -> list[str]:
    middle = top + ROW_HEIGHT / 2
    times_ms = [1000 * seconds for seconds in samples.ttft_seconds]
    median_ms = statistics.median(times_ms)
    bar_width = _x(median_ms, end_ms) - LEFT
    parts = [
        _text(LEFT - 12, middle - 3, name, anchor="end", weight=600),
        _text(LEFT - 12, middle + 12, MEANINGS[name], anchor="end", size=10.5, colour="#5c636e"),
        f'<rect x="{LEFT}" y="{middle - BAR_HEIGHT / 2}" width="{bar_width:.1f}" height="{BAR_HEIGHT}" rx="2" '
        f'fill="{_colour(samples)}" fill-opacity="0.75"/>',
    ]
    if len(times_ms) > 1:
        first, _, third = statistics.quantiles(times_ms, n=4, method="inclusive")
        parts.append(
            f'<line x1="{_x(first, end_ms):.1f}" y1="{middle}" x2="{_x(third, end_ms):.1f}" y2="{middle}" '
            'stroke="#1c1f24" stroke-width="2"/>'
        )
    parts += [
        f'<circle cx="{_x(value, end_ms):.1f}" cy="{middle}" r="2.5" fill="#1c1f24" fill-opacity="0.45"/>'
        for value in times_ms
    ]
    label_x = _x(max(times_ms), end_ms) + 8
    parts.append(_text(label_x, middle + 4.5, f"{median_ms:.0f} ms", weight=600))
    return parts


def _text(
    x: float,
    y: float,
    content: str,
    *,
    anchor: str = "start",
    size: float = 13,
    weight: int = 400,
    colour: str = "#1c1f24",
) -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="{size}" font-weight="{weight}" '
        f'fill="{colour}">{escape(content)}</text>'
    )
