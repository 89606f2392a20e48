"""Picture of an experiment: differences of its arms from the baseline with their intervals, one panel per metric."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_cpt.views.figure import FAINT, GRID, INK, save_figure

_BEST, _WORSE, _NOISE = "#15803d", "#b91c1c", "#6b7280"
_COLORS: Mapping[str, str] = {"better": _BEST, "worse": _WORSE}


@dataclass(frozen=True)
class PlottedArm:
    """Difference of an arm from the baseline; `half_width` is of its interval, None: unknown."""

    name: str
    difference: float
    half_width: float | None
    verdict: str


def plot_differences(title: str, panels: Mapping[str, Sequence[PlottedArm]], path: str | Path) -> None:
    """Draw differences into an image file.

    Args:
        title: title of the picture.
        panels: arms per panel, by the panel's title, the best first.
        path: the file; its extension decides the format.

    Raises:
        UserError: matplotlib is not installed, the file cannot be written, or the format is unknown.
    """
    rows = [max(1, len(arms)) for arms in panels.values()]
    size = (9.0, 1.2 + 0.8 * len(panels) + 0.32 * sum(rows))
    with save_figure(path, size, rows=len(panels), sharex=False, height_ratios=rows, squeeze=False) as grid:
        for axes, (name, arms) in zip(grid[:, 0], panels.items(), strict=True):
            axes.axvline(0.0, color=INK, linewidth=1)
            for place, arm in enumerate(arms):
                color = _COLORS.get(arm.verdict, _NOISE)
                axes.errorbar(arm.difference, -place, xerr=arm.half_width, fmt="o", color=color, capsize=3)
                axes.annotate(arm.verdict, (1.01, -place), xycoords=("axes fraction", "data"), color=color, va="center")
            axes.set_yticks([-place for place in range(len(arms))], [arm.name for arm in arms])
            axes.set_ylim(-max(1, len(arms)) + 0.4, 0.6)
            axes.set_xlabel(name, color=FAINT)
            axes.grid(axis="x", color=GRID)
            axes.set_axisbelow(True)
        grid[0, 0].set_title(title, loc="left", fontweight="bold")
