"""The comparison's chart: times to first token on the left, where prompt tokens came from on the right."""

from pathlib import Path

from quickstart_lib import svg
from quickstart_lib.chart import BAR_HEIGHT, COMPUTED_COLOUR, GPU_COLOUR, NVME_COLOUR, samples_row
from quickstart_lib.fleet.measurements import WAYS, Played

WIDTH = 1220
TIMES_LEFT, TIMES_RIGHT = 360, 740
TOKENS_LEFT, TOKENS_RIGHT = 890, 1190
TOP = 104
ROW_HEIGHT = 58
BOTTOM = 56
TIME_COLOUR = GPU_COLOUR
CACHED_COLOUR = "#1f9d6b"
ENGINE_COLOURS = (COMPUTED_COLOUR, NVME_COLOUR)


def write(played: dict[str, Played], footnote: str, path: Path) -> None:
    """Write the chart; both axes start at zero, in milliseconds and in tokens."""
    rows = [(way, played[way.name]) for way in WAYS]
    times = svg.Axis.over(TIMES_LEFT, TIMES_RIGHT, 1000 * max(max(it.ttft_seconds) for _, it in rows))
    tokens = svg.Axis.over(TOKENS_LEFT, TOKENS_RIGHT, max(it.prompt_tokens for _, it in rows))
    bottom = TOP + ROW_HEIGHT * len(rows)
    parts = [
        svg.text(24, 32, "Two vLLM engines behind the router: the same conversations, three ways", size=18, weight=600),
        svg.text(
            24,
            54,
            "Time to first token. Bar: median. Line: interquartile range. Mark: p90. Dots: every request. "
            "Numbers: median / p90.",
            colour=svg.QUIET,
        ),
        *_legend(),
        *times.drawn(TOP, bottom, " ms"),
        *tokens.drawn(TOP, bottom, ""),
    ]
    for index, (way, it) in enumerate(rows):
        middle = TOP + ROW_HEIGHT * (index + 0.5)
        p90_ms = 1000 * it.percentile_seconds(90)
        p90 = times.x(p90_ms)
        times_ms = [1000 * seconds for seconds in it.ttft_seconds]
        parts += [
            svg.text(TIMES_LEFT - 12, middle - 3, way.name, anchor="end", weight=600),
            svg.text(TIMES_LEFT - 12, middle + 12, way.meaning, anchor="end", size=10.5, colour=svg.QUIET),
            *samples_row(times, middle, times_ms, TIME_COLOUR, f" / {p90_ms:.0f}"),
            svg.line(p90, middle - BAR_HEIGHT / 2 - 4, p90, middle + BAR_HEIGHT / 2 + 4, colour=svg.INK),
            *_tokens(tokens, middle, it),
        ]
    parts.append(svg.text(24, bottom + BOTTOM - 14, footnote, size=11, colour=svg.QUIET))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(svg.document(WIDTH, bottom + BOTTOM, parts))


def _legend() -> list[str]:
    """What the colours on the right mean."""
    parts, x = [svg.text(TOKENS_LEFT, 54, "Prompt tokens:", colour=svg.QUIET)], float(TOKENS_LEFT)
    named = [("cached", CACHED_COLOUR)]
    named += list(zip(("computed by busier", "by other engine"), ENGINE_COLOURS, strict=True))
    for name, colour in named:
        parts += [svg.bar(x, 76, 12, 12, colour), svg.text(x + 17, 80, name, size=11, colour=svg.QUIET)]
        x += 30 + 6.1 * len(name)
    return parts


def _tokens(axis: svg.Axis, middle: float, played: Played) -> list[str]:
    """One bar of cached tokens, then those that the busier and the other engine computed."""
    computed = [share.computed_tokens for share in played.balance()]
    pieces = [(played.cached_tokens, CACHED_COLOUR), *zip(computed, ENGINE_COLOURS, strict=True)]
    parts, before = [], 0
    for count, colour in pieces:
        start = axis.x(before)
        parts.append(svg.bar(start, middle, axis.x(before + count) - start, BAR_HEIGHT, colour))
        before += count
    label = f"{played.cached_share:.0%}"
    parts.append(svg.text(axis.x(0) + 6, middle + 4.5, label, weight=600, colour="#ffffff"))
    return parts
