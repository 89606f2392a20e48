"""Charts as inline SVG: for print, for pages without scripts, and for the short look of a screen reader.

Colors are classes (`c0` to `c5`) that the style sheet of the page defines, lines also differ by their dashes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from html import escape

from megatron_cpt.report.downsample import downsample
from megatron_cpt.report.page import ChangeChart, CurveChart, plain_text, signed

DASHES = ("", "7 4", "2 3", "9 3 2 3")
NUM_COLORS = 6
_WIDTH, _HEIGHT = 760, 270
_LEFT, _RIGHT, _TOP, _BOTTOM = 62, 14, 22, 34
_MAX_BUCKETS = 240
_ROW_HEIGHT, _LABEL_WIDTH = 22, 150


def curve_style(place: int, *, may_coincide: bool = False) -> tuple[int, str]:
    """Return color and dashes of a curve.

    Three plain lines in distinct colors come first, then dashed ones. Curves that may coincide, such as the rates of
    two runs, have other dashes from the second on, so that the lower one stays visible.
    """
    return place % NUM_COLORS, DASHES[(place if may_coincide else place // 3) % len(DASHES)]


def nice_ticks(low: float, high: float, most: int = 6) -> list[float]:
    """Return round numbers from low to high. Example: 0.13 to 0.88 gives 0.2, 0.4, 0.6 and 0.8."""
    span = high - low
    if not span > 0 or not math.isfinite(span):
        return [low]
    raw = span / most
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [number * step for number in range(first, math.floor(high / step + 1e-9) + 1)]


def curve_svg(chart: CurveChart) -> str:
    """Return a chart of curves over steps."""
    return "".join(_curve_parts(chart))


def change_svg(chart: ChangeChart) -> str:
    """Return a chart of changes, one row per name and one dot per run."""
    return "".join(_change_parts(chart))


def _curve_parts(chart: CurveChart) -> Iterator[str]:
    yield _head(chart.title, chart.unit, chart.summary, _HEIGHT)
    known = [value for curve in chart.curves for value in curve.values if value is not None]
    if not known or not chart.steps:
        yield f'<text x="{_WIDTH / 2}" y="{_HEIGHT / 2}" text-anchor="middle">no finite value</text></svg>'
        return
    x_low, x_high = _padded(float(chart.steps[0]), float(chart.steps[-1]), 0.0)
    y_low, y_high = _padded(min(known), max(known), 0.05)

    def x_of(step: float) -> float:
        return _LEFT + (step - x_low) / (x_high - x_low) * (_WIDTH - _LEFT - _RIGHT)

    def y_of(value: float) -> float:
        return _TOP + (y_high - value) / (y_high - y_low) * (_HEIGHT - _TOP - _BOTTOM)

    bottom = _HEIGHT - _BOTTOM
    for tick in nice_ticks(y_low, y_high, 5):
        y = y_of(tick)
        yield f'<path class="grid" d="M{_LEFT} {y:.1f}H{_WIDTH - _RIGHT}"/>'
        yield f'<text x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{tick:.6g}</text>'
    for tick in nice_ticks(x_low, x_high, 8):
        yield f'<text x="{x_of(tick):.1f}" y="{bottom + 16}" text-anchor="middle">{tick:,.6g}</text>'
    yield f'<text x="{_WIDTH - _RIGHT}" y="{_HEIGHT - 4}" text-anchor="end">step</text>'
    for step, name in chart.switches:
        if x_low <= step <= x_high:
            x = x_of(step)
            yield f'<path class="switch" d="M{x:.1f} {_TOP}V{bottom}"/>'
            yield f'<text x="{x:.1f}" y="{_TOP - 8}" text-anchor="middle">{_safe(name)} from here</text>'
    for step, text in chart.flags:
        if x_low <= step <= x_high:
            mark = f"M{x_of(step):.1f} {_TOP}l-4 -7h8z"
            yield f'<path class="flag" d="{mark}"><title>step {step:,}: {_safe(text)}</title></path>'
    for place, curve in enumerate(chart.curves):
        color, dashes = curve_style(place, may_coincide=chart.may_coincide)
        points = _thinned(chart.steps, curve.values)
        path = "M" + "L".join(f"{x_of(step):.1f} {y_of(value):.1f}" for step, value in points)
        dash = f' stroke-dasharray="{dashes}"' if dashes else ""
        if points:
            yield f'<path class="curve c{color}"{dash} d="{path}"/>'
        if chart.has_points:
            errors = dict(zip(chart.steps, curve.errors or [], strict=False))
            for step, value in points:
                error = errors.get(step)
                if error is not None:
                    span = f"M{x_of(step):.1f} {y_of(value - error):.1f}V{y_of(value + error):.1f}"
                    yield f'<path class="error c{color}" d="{span}"/>'
                yield f'<circle class="dot c{color}" cx="{x_of(step):.1f}" cy="{y_of(value):.1f}" r="3"/>'
    yield "</svg>"


def _thinned(steps: Sequence[int], values: Sequence[float | None]) -> list[tuple[int, float]]:
    """Return the points of a curve that has values, as many as the width of a page can show."""
    points = [(step, value) for step, value in zip(steps, values, strict=True) if value is not None]
    at, columns = downsample([step for step, _ in points], {"y": [value for _, value in points]}, _MAX_BUCKETS)
    return list(zip(at.tolist(), columns["y"].tolist(), strict=True))


def _change_parts(chart: ChangeChart) -> Iterator[str]:
    height = 40 + _ROW_HEIGHT * len(chart.rows)
    known = [end for run in chart.changes for place in range(len(chart.rows)) for end in _interval(chart, run, place)]
    yield _head(chart.title, chart.unit, chart.summary, height)
    low, high = _padded(min([0.0, *known]), max([0.0, *known]), 0.08)
    left = _LABEL_WIDTH + 10

    def x_of(value: float) -> float:
        return left + (value - low) / (high - low) * (_WIDTH - left - _RIGHT)

    bottom = 14 + _ROW_HEIGHT * len(chart.rows)
    for tick in nice_ticks(low, high, 7):
        kind = "zero" if abs(tick) < 1e-12 else "grid"
        yield f'<path class="{kind}" d="M{x_of(tick):.1f} 8V{bottom}"/>'
        yield f'<text x="{x_of(tick):.1f}" y="{bottom + 18}" text-anchor="middle">{signed(tick, 3)}</text>'
    for number, name in enumerate(chart.rows):
        y = 8 + _ROW_HEIGHT * (number + 0.5)
        shown = name if len(name) <= 20 else f"{name[:19]}…"
        label = f"{_safe(shown)}<title>{_safe(name)}</title>"
        yield f'<text x="{_LABEL_WIDTH}" y="{y + 4:.1f}" text-anchor="end">{label}</text>'
        yield f'<path class="grid" d="M{left} {y:.1f}H{_WIDTH - _RIGHT}"/>'
        for place, (run, values) in enumerate(chart.changes.items()):
            value = values[number]
            if value is None:
                continue
            title = f"<title>{_safe(run)}, {_safe(name)}: {signed(value)}</title>"
            first, last = _interval(chart, run, number)
            if first < last:
                yield f'<path class="error c{curve_style(place)[0]}" d="M{x_of(first):.1f} {y:.1f}H{x_of(last):.1f}"/>'
            elif not place:
                yield f'<path class="stem c0" d="M{x_of(0.0):.1f} {y:.1f}H{x_of(value):.1f}"/>'
            yield marker(place, x_of(value), y, title)
    yield "</svg>"


def _interval(chart: ChangeChart, run: str, row: int) -> tuple[float, ...]:
    """Return both ends of the interval around a change; empty if the change is unknown."""
    value = chart.changes[run][row]
    half = chart.half_widths[run][row] if run in chart.half_widths else None
    return () if value is None else (value - (half or 0.0), value + (half or 0.0))


def marker(place: int, x: float, y: float, title: str = "") -> str:
    """Return the dot of a run; its shape differs as well, for readers who do not see colors."""
    shapes = ("M{x} {y}m-5 0a5 5 0 1 0 10 0a5 5 0 1 0 -10 0z", "M{x} {y}m-5 -5h10v10h-10z", "M{x} {y}m0 -6l6 11h-12z")
    path = shapes[place % len(shapes)].format(x=f"{x:.1f}", y=f"{y:.1f}")
    return f'<path class="dot c{curve_style(place)[0]}" d="{path}">{title}</path>'


def _padded(low: float, high: float, share: float) -> tuple[float, float]:
    """Return a range that is not empty, with a margin on both sides."""
    margin = (high - low) * share
    if high - low <= abs(high) * 1e-12:
        margin = abs(high) * 0.05 or 0.5
    return low - margin, high + margin


def _head(title: str, unit: str, summary: str, height: float) -> str:
    label = _safe(f"{title}{f' ({unit})' if unit else ''}. {summary}")
    return f'<svg viewBox="0 0 {_WIDTH} {height:g}" role="img" aria-label="{label}">'


def _safe(text: str) -> str:
    return escape(plain_text(text), quote=True)
