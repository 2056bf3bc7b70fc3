"""The chart: one row per source with every sample, the median and the interquartile range. Plain SVG, no dependency."""

import statistics
from collections.abc import Mapping
from pathlib import Path

from quickstart_lib import svg
from quickstart_lib.measurements import MEANINGS, Measurements, Samples

WIDTH = 920
LEFT = 380
RIGHT = 100
TOP = 78
ROW_HEIGHT = 46
BAR_HEIGHT = 20
BOTTOM = 56
COMPUTED_COLOUR, GPU_COLOUR, DRAM_COLOUR, NVME_COLOUR = "#8a8f98", "#5b8def", "#1f9d6b", "#d9822b"


TITLE = "Time to first token, by where the prompt's KV came from"


def write(
    measured: Measurements, footnote: str, path: Path, *, title: str = TITLE, meanings: Mapping[str, str] = MEANINGS
) -> None:
    """Write the chart; the axis starts at zero and is in milliseconds.

    `meanings`: the sources to show, in their order, and what each one means.
    """
    rows = [(name, measured.sources[name]) for name in meanings if name in measured.sources]
    axis = svg.Axis.over(LEFT, WIDTH - RIGHT, 1000 * max(max(samples.ttft_seconds) for _, samples in rows))
    bottom = TOP + ROW_HEIGHT * len(rows)
    parts = [
        svg.text(24, 32, title, size=18, weight=600),
        svg.text(
            24,
            54,
            "Bar: median. Line: interquartile range. Dots: every request. "
            "Grey: computed. Blue: GPU hit. Green: DRAM. Orange: NVMe.",
            colour=svg.QUIET,
        ),
        *axis.drawn(TOP, bottom, " ms"),
    ]
    for index, (name, samples) in enumerate(rows):
        middle = TOP + ROW_HEIGHT * (index + 0.5)
        parts += [
            svg.text(LEFT - 12, middle - 3, name, anchor="end", weight=600),
            svg.text(LEFT - 12, middle + 12, meanings[name], anchor="end", size=10.5, colour=svg.QUIET),
            *samples_row(axis, middle, [1000 * seconds for seconds in samples.ttft_seconds], _colour(samples)),
        ]
    parts.append(svg.text(24, bottom + BOTTOM - 14, footnote, size=11, colour=svg.QUIET))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(svg.document(WIDTH, bottom + BOTTOM, parts))


def samples_row(axis: svg.Axis, middle: float, times_ms: list[float], colour: str, more: str = "") -> list[str]:
    """A bar to the median, a line over the interquartile range, a dot for every sample, and the median's value, with
    `more` after its number.
    """
    median_ms = statistics.median(times_ms)
    parts = [svg.bar(axis.left, middle, axis.x(median_ms) - axis.left, BAR_HEIGHT, colour)]
    if len(times_ms) > 1:
        first, _, third = statistics.quantiles(times_ms, n=4, method="inclusive")
        parts.append(svg.line(axis.x(first), middle, axis.x(third), middle))
    parts += [svg.dot(axis.x(value), middle) for value in times_ms]
    parts.append(svg.text(axis.x(max(times_ms)) + 8, middle + 4.5, f"{median_ms:.0f}{more} ms", weight=600))
    return parts


def _colour(samples: Samples) -> str:
    if samples.hits:
        return NVME_COLOUR if samples.hits.nvme > samples.hits.dram else DRAM_COLOUR
    return GPU_COLOUR if samples.cached_tokens else COMPUTED_COLOUR
