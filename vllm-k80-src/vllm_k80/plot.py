"""Line plots as SVG, to be put into a page as they are.

Standard library only, and nothing newer than Python 3.9: hosts without this package use the file
alone. The page decides the colours with CSS: `--plot-ink`, `--plot-grid` and `--plot-1` to
`--plot-6`; without these they are such as show on white and on black.
"""

from __future__ import annotations

import html
import math
from collections.abc import Collection, Iterator, Mapping, Sequence

# Fallbacks, of about the same contrast with white and with black.
_COLOURS = ("#3b7fd9", "#d9730d", "#139a6b", "#cf4a8d", "#8a6be0", "#97820b")
_INK = 'fill="var(--plot-ink, currentColor)"'
_GRID = 'stroke="var(--plot-grid, currentColor)" stroke-opacity="0.25"'
_LEFT, _RIGHT, _TITLE, _BOTTOM = 60, 14, 26, 42  # pixels around the plot
_LEGEND_LINE = 17
_CHARACTER = 6.6  # about the width of one, at 12 pixels
_DOTS_UP_TO = 30  # points: dots would hide a longer curve


def _known(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def _ticks(low: float, high: float, about: int) -> list[float]:
    """Multiples of 1, 2 or 5 times a power of ten, from the last below `low` to past `high`."""
    rough = (high - low) / about
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough * 0.999)
    first, last = math.floor(low / step + 1e-6), math.ceil(high / step - 1e-6)
    return [number * step for number in range(first, last + 1)]


def _label(value: float, step: float) -> str:
    if value and not 1e-4 <= abs(value) < 1e9:
        return f"{value:.3g}"
    return f"{value:,.{max(0, -math.floor(math.log10(step) + 1e-6))}f}"


def _colour(number: int) -> str:
    number %= len(_COLOURS)
    return f"var(--plot-{number + 1}, {_COLOURS[number]})"


def _runs(points: Sequence[tuple[float, float | None]]) -> Iterator[list[tuple[float, float]]]:
    """The stretches between what is not known."""
    run: list[tuple[float, float]] = []
    for x, y in points:
        if y is not None and _known(x) and _known(y):
            run.append((x, y))
        elif run:
            yield run
            run = []
    if run:
        yield run


def line_plot(
    series: Mapping[str, Sequence[tuple[float, float | None]]],
    *,
    title: str,
    x_label: str,
    y_label: str,
    width: int = 640,
    height: int = 280,
    dashed: Collection[str] = (),
) -> str:
    """One `<svg>` with a line for each of the series.

    Args:
        series: by name, points in the order of x. A y of None or NaN is a gap.
        title: above the plot, and what a screen reader says.
        x_label: what x is, with its unit.
        y_label: the same for y, whose axis begins at 0 unless there are values below it.
        width: of the drawing, in pixels.
        height: the same; it becomes more where the legend would leave no room.
        dashed: names of series to be drawn so, because they are of another kind.
    """
    runs = {name: list(_runs(points)) for name, points in series.items()}
    known = [point for stretches in runs.values() for run in stretches for point in run]

    legend, x, top = [], float(_LEFT), float(_TITLE)
    for number, name in enumerate(series):
        text = name if runs[name] else f"{name} (no data)"
        wide = 38 + _CHARACTER * len(text)
        if x > _LEFT and x + wide > width - _RIGHT:
            x, top = float(_LEFT), top + _LEGEND_LINE
        legend.append((number, name, text, x, top + 10))
        x += wide
    top += _LEGEND_LINE * bool(series) + 6
    height = max(height, math.ceil(top) + 60 + _BOTTOM)
    right, bottom = width - _RIGHT, height - _BOTTOM

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" role="img" width="{width}" height="{height}" '
        f'viewBox="0 0 {width} {height}" font-family="sans-serif" font-size="12">',
        f"<title>{html.escape(title)}</title>",
    ]

    def say(x: float, y: float, words: str, more: str = "") -> None:
        parts.append(f'<text x="{x:.1f}" y="{y:.1f}" {_INK}{more}>{html.escape(words)}</text>')

    def line(x1: float, y1: float, x2: float, y2: float) -> None:
        ends = f'x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"'
        parts.append(f"<line {ends} {_GRID}/>")

    middle = (top + bottom) / 2
    say(_LEFT, 16, title, ' font-weight="bold"')
    say((_LEFT + right) / 2, height - 8, x_label, ' text-anchor="middle"')
    turned = f' text-anchor="middle" transform="rotate(-90 13 {middle:.1f})"'
    say(13, middle, y_label, turned)

    def strokes(number: int, name: str) -> str:
        # More series than colours: the same ones, dotted.
        dashes = "6 4" if name in dashed else "2 3" if number >= len(_COLOURS) else "none"
        return (
            f'stroke="{_colour(number)}" stroke-width="2" stroke-dasharray="{dashes}" fill="none"'
        )

    for number, name, text, x, y in legend:
        ends = f'x1="{x:.1f}" y1="{y - 4:.1f}" x2="{x + 18:.1f}" y2="{y - 4:.1f}"'
        parts.append(f"<line {ends} {strokes(number, name)}/>")
        say(x + 23, y, text)

    if not known:
        say((_LEFT + right) / 2, middle, "No data.", ' text-anchor="middle"')
        line(_LEFT, bottom, right, bottom)
        return "".join([*parts, "</svg>"])

    x_low, x_high = min(x for x, _ in known), max(x for x, _ in known)
    if x_low == x_high:
        x_low, x_high = x_low - (abs(x_low) / 2 or 1), x_high + (abs(x_high) / 2 or 1)
    y_low, y_high = min(0, *(y for _, y in known)), max(0, *(y for _, y in known))
    if y_low == y_high:
        y_high = 1.0
    y_ticks = _ticks(y_low, y_high, 5)
    x_ticks = _ticks(x_low, x_high, 8)
    y_low, y_high = y_ticks[0], y_ticks[-1]

    def across(x: float) -> float:
        return _LEFT + (x - x_low) / (x_high - x_low) * (right - _LEFT)

    def down(y: float) -> float:
        return bottom - (y - y_low) / (y_high - y_low) * (bottom - top)

    for tick in y_ticks:
        line(_LEFT, down(tick), right, down(tick))
        label = _label(tick, y_ticks[1] - y_ticks[0])
        say(_LEFT - 6, down(tick) + 4, label, ' text-anchor="end"')
    slack = (x_high - x_low) * 1e-6
    for tick in x_ticks:
        if x_low - slack <= tick <= x_high + slack:
            line(across(tick), bottom, across(tick), bottom + 4)
            label = _label(tick, x_ticks[1] - x_ticks[0])
            say(across(tick), bottom + 17, label, ' text-anchor="middle"')

    for number, (name, stretches) in enumerate(runs.items()):
        few = sum(map(len, stretches)) <= _DOTS_UP_TO
        for run in stretches:
            if len(run) > 1:
                at = " ".join(f"{across(x):.1f},{down(y):.1f}" for x, y in run)
                parts.append(f'<polyline points="{at}" {strokes(number, name)}/>')
            for x, y in run if few or len(run) == 1 else ():
                at = f'cx="{across(x):.1f}" cy="{down(y):.1f}" r="3" fill="{_colour(number)}"'
                tip = html.escape(f"{name}: {x:g}, {y:g}")
                parts.append(f"<circle {at}><title>{tip}</title></circle>")
    return "".join([*parts, "</svg>"])
