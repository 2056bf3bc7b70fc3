"""Pieces of a chart in plain SVG: text, rectangles, dots, and a horizontal axis."""

import math
from dataclasses import dataclass
from html import escape

TICKS_WANTED = 5
INK, QUIET, GRID = "#1c1f24", "#5c636e", "#e3e6ea"


def text(
    x: float,
    y: float,
    content: str,
    *,
    anchor: str = "start",
    size: float = 13,
    weight: int = 400,
    colour: str = INK,
) -> str:
    """One line of text."""
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="{size}" font-weight="{weight}" '
        f'fill="{colour}">{escape(content)}</text>'
    )


def bar(x: float, middle: float, width: float, height: float, colour: str) -> str:
    """A horizontal bar around the height `middle`."""
    return (
        f'<rect x="{x:.1f}" y="{middle - height / 2:.1f}" width="{width:.1f}" height="{height:.1f}" rx="2" '
        f'fill="{colour}" fill-opacity="0.75"/>'
    )


def dot(x: float, middle: float) -> str:
    """One sample."""
    return f'<circle cx="{x:.1f}" cy="{middle:.1f}" r="2.5" fill="{INK}" fill-opacity="0.45"/>'


def line(x1: float, y1: float, x2: float, y2: float, *, colour: str = INK, width: float = 2) -> str:
    """A straight line."""
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="{colour}" stroke-width="{width}"/>'


def document(width: float, height: float, parts: list[str]) -> str:
    """The whole picture, on white."""
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        f'font-family="system-ui, DejaVu Sans, Arial, sans-serif" font-size="13" fill="{INK}">'
    )
    return "\n".join([head, f'<rect width="{width}" height="{height}" fill="#ffffff"/>', *parts, "</svg>"]) + "\n"


@dataclass(frozen=True)
class Axis:
    """From zero at `left` to `end` at `right`, with a tick every `step`."""

    left: float
    right: float
    end: float
    step: float

    @classmethod
    def over(cls, left: float, right: float, longest: float) -> "Axis":
        """An axis with round ticks that holds `longest`."""
        step = _tick_step(longest / TICKS_WANTED)
        return cls(left, right, math.ceil(longest / step) * step, step)

    def x(self, value: float) -> float:
        """Where a value lies."""
        return self.left + (self.right - self.left) * value / self.end

    def drawn(self, top: float, bottom: float, unit: str) -> list[str]:
        """The ticks' lines from `top` to `bottom`, and their values below."""
        parts = []
        for index in range(round(self.end / self.step) + 1):
            value = index * self.step
            parts.append(line(self.x(value), top, self.x(value), bottom, colour=GRID, width=1))
            parts.append(text(self.x(value), bottom + 18, f"{value:,g}{unit}", anchor="middle", size=11, colour=QUIET))
        return parts


def _tick_step(wanted: float) -> float:
    power: float = 10.0 ** math.floor(math.log10(wanted))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= wanted)
