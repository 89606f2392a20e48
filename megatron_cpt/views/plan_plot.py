"""Plot of a plan: learning rate over tokens, phases, and the blend of each phase."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from megatron_cpt.config import format_count
from megatron_cpt.planning.run_plan import RunPlan
from megatron_cpt.planning.timeline.phases import PhasePlan
from megatron_cpt.views.figure import FAINT, GRID, INK, save_figure
from megatron_cpt.views.plan_table import describe_schedule

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_POINTS = 800
_RATE = "#1d4ed8"
_PHASES = ("#eef2ff", "#fff7ed", "#ecfdf5", "#fdf2f8", "#f5f3ff", "#fefce8")
_SOURCES = (
    *("#7aa6d8", "#8fce8b", "#f6b26b", "#86d0cb", "#f3d873", "#c6a0d0"),
    *("#c9a588", "#a9b4c4", "#f7b3c2", "#f08c84", "#b5e0a8", "#d9d2c5"),
)
_CURVES = ("#1d4ed8", "#b45309", "#047857", "#be185d", "#6d28d9", "#0e7490", "#4d7c0f", "#9f1239")
_MAX_NAMED = len(_SOURCES)  # sources with their own color and legend entry
_NAMES_FROM = 0.92  # share of the upper panel's height above which the names of the phases are written
_MIN_LABELED = 0.05  # smallest weight that is written into its bar


def plot_plan(plan: RunPlan, path: str | Path, prediction: Mapping[str, Any] | None = None) -> None:
    """Draw a plan into an image file.

    Args:
        prediction: `RunPrediction.to_dict()`; its held-out losses become a third panel.

    Raises:
        UserError: if matplotlib is not installed, or the file cannot be written, or the format is unknown.
    """
    heights = (3, 2) if prediction is None else (3, 2, 3)
    with save_figure(path, (11, 2.4 * len(heights) + 2.4), rows=len(heights), height_ratios=heights) as panels:
        rates, blends, lowest = panels[0], panels[1], panels[-1]
        _draw_rates(rates, plan)
        _draw_blends(blends, plan)
        if prediction is not None:
            _draw_losses(lowest, prediction)
        lowest.set_xlim(0, plan.tokens_trained)
        lowest.xaxis.set_major_formatter(lambda value, _: format_count(value))
        lowest.set_xlabel("tokens")
        title = f"{plan.name}: {format_count(plan.tokens)} tokens, {plan.steps:,} steps"
        rates.set_title(f"{title}\n", loc="left", fontsize=14, fontweight="bold")
        subtitle = f"{describe_schedule(plan.schedule)}; {format_count(plan.parameters.total)} parameters"
        rates.text(0, 1.035, subtitle, transform=rates.transAxes, color=FAINT)


def _draw_rates(axes: Axes, plan: RunPlan) -> None:
    steps = np.unique(np.linspace(1, plan.steps, min(_POINTS, plan.steps)).round().astype(np.int64))
    done = [plan.after(step - 1).tokens for step in steps.tolist()]
    axes.plot(done, plan.schedule.rates(steps), color=_RATE, linewidth=2.2, zorder=3)
    axes.set_ylim(0, plan.schedule.max_lr * 1.12)
    axes.set_ylabel("learning rate")
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.grid(axis="y", color=GRID)
    axes.set_axisbelow(True)
    for number, phase in enumerate(plan.phases):
        start, end = _extent(plan, phase)
        axes.axvspan(start, end, color=_PHASES[number % len(_PHASES)], zorder=0)
        place: dict[str, Any] = {"transform": axes.get_xaxis_transform(), "ha": "center", "va": "top"}
        axes.text((start + end) / 2, 0.975, phase.name, fontweight="bold", **place)
        if number:
            _mark_switch(axes, plan, phase)


def _mark_switch(axes: Axes, plan: RunPlan, phase: PhasePlan) -> None:
    """Draw a line at the first step of a phase, labeled with learning rate and tokens."""
    start, rate = _extent(plan, phase)[0], phase.lr_first
    axes.axvline(start, color=INK, linewidth=0.9, linestyle=(0, (4, 3)), zorder=2)
    axes.plot([start], [rate], "o", color=_RATE, markeredgecolor="white", markersize=8, zorder=4)
    on_right = start < 0.68 * plan.tokens_trained
    axes.annotate(
        f"step {phase.first_step:,}, after {format_count(start)} tokens\n"
        f"rate {rate:.3g} = {rate / plan.schedule.max_lr:.3g} of the highest",
        (start, _free_height(axes, plan, phase.first_step, on_right)),
        xycoords=axes.get_xaxis_transform(),
        xytext=(12 if on_right else -12, 0),
        textcoords="offset points",
        ha="left" if on_right else "right",
        va="center",
        bbox={"boxstyle": "round,pad=0.4", "facecolor": "white", "edgecolor": GRID},
        zorder=5,
    )


def _free_height(axes: Axes, plan: RunPlan, step: int, on_right: bool) -> float:
    """Return the height, as a share of the axes, at which a label beside a step covers the curve least.

    The label is about a third of the axes wide.
    """
    width = plan.steps // 3
    beside = np.linspace(step, step + width if on_right else step - width, 50).round().astype(np.int64)
    heights = plan.schedule.rates(beside.clip(1, plan.steps)) / axes.get_ylim()[1]
    room_above, room_below = _NAMES_FROM - heights.max(), heights.min()
    return float(_NAMES_FROM - room_above / 2 if room_above > room_below else room_below / 2)


def _draw_blends(axes: Axes, plan: RunPlan) -> None:
    names = _stacking_order(plan)
    colors = dict(zip(names, itertools.cycle(_SOURCES), strict=False))
    for phase in plan.phases:
        start, end = _extent(plan, phase)
        bottom = 0.0
        for name, weight in _shown_weights(phase, names).items():
            style: dict[str, Any] = {"color": colors[name], "edgecolor": "white", "linewidth": 0.8, "label": name}
            axes.bar(start, weight, width=end - start, bottom=bottom, align="edge", **style)
            if weight >= _MIN_LABELED and end - start > 0.06 * plan.tokens_trained:
                axes.text((start + end) / 2, bottom + weight / 2, f"{weight:.1%}", ha="center", va="center", fontsize=8)
            bottom += weight
    axes.set_ylim(0, 1)
    axes.set_ylabel("share of the samples")
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    handles = dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    shown = [name for name in reversed(names) if name in handles]
    axes.legend(
        [handles[name] for name in shown],
        [_label(plan, name) for name in shown],
        title="source (epochs)",
        loc="center left",
        bbox_to_anchor=(1.005, 0.5),
        frameon=False,
        alignment="left",
    )


def _draw_losses(axes: Axes, prediction: Mapping[str, Any]) -> None:
    """Draw the expected change of each held-out loss with its interval."""
    tokens = np.array(prediction["tokens"])
    for (name, one), color in zip(prediction["held_out"].items(), itertools.cycle(_CURVES), strict=False):
        change, low, high = (np.array(one[key]) - one["start"] for key in ("losses", "lows", "highs"))
        axes.fill_between(tokens, low, high, color=color, alpha=0.13, linewidth=0)
        axes.plot(tokens, change, color=color, linewidth=1.8, label=f"{name} ({one['final']:.3f})")
    axes.axhline(0, color=FAINT, linewidth=0.8)
    axes.grid(axis="y", color=GRID)
    axes.set_axisbelow(True)
    axes.set_ylabel("change of the held-out loss")
    title = f"expected (at the end), with\n{prediction['confidence']:.0%} interval"
    axes.legend(title=title, loc="center left", bbox_to_anchor=(1.005, 0.5), frameon=False, alignment="left")


def _extent(plan: RunPlan, phase: PhasePlan) -> tuple[int, int]:
    return phase.segments[0].first_token, phase.segments[-1].end.tokens


def _stacking_order(plan: RunPlan) -> list[str]:
    """Return source names from bottom to top, the largest first; sources beyond the palette become one entry."""
    by_size = sorted(plan.sources, key=lambda name: -plan.sources[name].tokens)
    named = by_size if len(by_size) <= _MAX_NAMED else by_size[: _MAX_NAMED - 1]
    return [*named, f"{len(by_size) - len(named)} others"] if len(named) < len(by_size) else named


def _shown_weights(phase: PhasePlan, names: list[str]) -> Mapping[str, float]:
    weights = {name: phase.weights[name] for name in names if name in phase.weights}
    rest = 1.0 - sum(weights.values())
    return weights | ({names[-1]: rest} if rest > 1e-9 else {})


def _label(plan: RunPlan, name: str) -> str:
    total = plan.sources.get(name)
    return name if total is None or total.epochs is None else f"{name} ({total.epochs:.2f})"
