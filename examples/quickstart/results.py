"""Show the results of the runs (metrics.jsonl, plan.json) as tables and a picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import orjson
from matplotlib.axes import Axes
from matplotlib.figure import Figure  # not pyplot: a file is written, and there may be no display
from rich.table import Table

from megatron_cpt.errors import RefusedError

# Okabe and Ito's palette, which color-blind readers can distinguish.
COLORS = {"base": "#7f7f7f", "baseline": "#0072b2", "recipe": "#d55e00"}
PHASE_SHADES = ("#f5f5f5", "#fdebd8")


@dataclass(frozen=True)
class RunMetrics:
    """Metrics of one run.

    Attributes:
        name: name of the run.
        phases: name -> its last step, in order.
        steps: training lines by rising step; of a step repeated after a resume, the last line.
        validations: step -> held-out loss by domain, nats per token; step 0 is before the first update.
    """

    name: str
    phases: dict[str, int]
    steps: list[dict[str, Any]]
    validations: dict[int, dict[str, float]]

    def column(self, key: str) -> np.ndarray:
        """Return one field of every training line."""
        return np.array([line[key] for line in self.steps])

    @property
    def before(self) -> dict[str, float]:
        """Held-out loss before the first update."""
        return self._validation(0)

    @property
    def after(self) -> dict[str, float]:
        """Held-out loss after the last update."""
        return self._validation(max(self.validations, default=-1))

    @property
    def tokens_per_step(self) -> int:
        """Tokens that one step trains on."""
        return int(self.steps[-1]["tokens"]) // int(self.steps[-1]["step"])

    def _validation(self, step: int) -> dict[str, float]:
        if step not in self.validations:
            raise RefusedError(
                f"run {self.name}: no validation at step {step}, so the run is not finished; train it to its end"
            )
        return self.validations[step]


def read_metrics(run_dir: Path) -> RunMetrics:
    """Read a run's metrics.jsonl and plan.json.

    Raises:
        RefusedError: a file is missing, a line is not JSON, or there is no training step.
    """
    path, plan = run_dir / "metrics.jsonl", run_dir / "plan.json"
    for needed in (path, plan):
        if not needed.exists():
            raise RefusedError(f"{needed}: missing, so the run has not been trained; train it first")
    steps: dict[int, dict[str, Any]] = {}
    validations: dict[int, dict[str, float]] = {}
    for number, text in enumerate(path.read_bytes().splitlines(), start=1):
        try:
            line = orjson.loads(text)
        except orjson.JSONDecodeError as error:
            raise RefusedError(f"{path}: line {number} is not JSON ({error})") from error
        if "loss" in line:
            steps[line["step"]] = line
        if "validation" in line:
            validations[line["step"]] = line["validation"]
    if not steps:
        raise RefusedError(f"{path}: has no training step; train the run first")
    # metrics.jsonl has a line every few steps; the plan has the exact last step of a phase.
    phases = {phase["name"]: phase["last_step"] for phase in orjson.loads(plan.read_bytes())["phases"]}
    return RunMetrics(run_dir.name, phases, [steps[step] for step in sorted(steps)], validations)


# ------------------------------------------------------------------------------------------------------------- tables


def loss_rows(baseline: RunMetrics, recipe: RunMetrics, groups: Mapping[str, Sequence[str]]) -> list[dict[str, Any]]:
    """Return one row of held-out losses per domain, with a mean row after each group of domains.

    Args:
        baseline: continued run with the pretraining blend.
        recipe: continued run with the recipe, from the same checkpoint.
        groups: title of a group -> its domains.

    Returns:
        Rows of `domain, before, baseline, recipe`, in nats per token; mean rows have `mean: True`.

    Raises:
        RefusedError: the two runs did not start from the same weights.
    """
    before = recipe.before
    apart = {name: loss for name, loss in before.items() if abs(loss - baseline.before[name]) > 1e-4}
    if apart:
        raise RefusedError(
            f"the two runs started at different held-out losses ({', '.join(sorted(apart))}), so from different "
            "weights, and cannot be compared; train both again from one base"
        )
    rows = []
    for title, domains in groups.items():
        entries = [
            {"domain": name, "before": before[name], "baseline": baseline.after[name], "recipe": recipe.after[name]}
            for name in domains
        ]
        means = {key: float(np.mean([entry[key] for entry in entries])) for key in ("before", "baseline", "recipe")}
        rows += [{**entry, "mean": False} for entry in entries]
        rows.append({"domain": f"mean of {title}", **means, "mean": True})
    return rows


def loss_table(rows: Sequence[dict[str, Any]]) -> Table:
    """Return `loss_rows` as a table for a terminal."""
    table = Table(title="Held-out loss by domain (nats per token; lower is better)", title_justify="left")
    table.add_column("domain")
    for heading in ("before", "baseline", "recipe", "recipe - baseline"):
        table.add_column(heading, justify="right")
    for row in rows:
        losses = [row["before"], row["baseline"], row["recipe"]]
        numbers = [f"{loss:.3f}" for loss in losses] + [f"{row['recipe'] - row['baseline']:+.3f}"]
        table.add_row(row["domain"], *numbers, style="bold" if row["mean"] else None, end_section=row["mean"])
    return table


def reading_table(runs: Sequence[RunMetrics], seq_length: int) -> Table:
    """Return a table of the tokens that each run has read, by source."""
    counts = [run.steps[-1]["samples_by_source"] for run in runs]
    table = Table(title="Tokens read by source", title_justify="left")
    table.add_column("source")
    for run in runs:
        table.add_column(run.name, justify="right")
    for source in dict.fromkeys(name for count in counts for name in count):
        table.add_row(source, *(f"{count.get(source, 0) * seq_length:,}" for count in counts))
    return table


# ------------------------------------------------------------------------------------------------------------ picture


def draw(
    base: RunMetrics, baseline: RunMetrics, recipe: RunMetrics, rows: Sequence[dict[str, Any]], path: Path
) -> None:
    """Draw learning rate, training loss and the change of the held-out losses into one picture."""
    figure = Figure(figsize=(9, 11), layout="constrained")
    rate, loss, change = figure.subplots(3, 1, height_ratios=(2, 3, 3))
    offset = float(base.steps[-1]["tokens"])
    for axes in (rate, loss):
        shade_phases(axes, recipe, offset)
    for run, start, style in ((base, 0.0, "-"), (baseline, offset, "-"), (recipe, offset, "--")):
        tokens = (start + run.column("tokens")) / 1e6
        rate.plot(tokens, run.column("lr"), style, color=COLORS[run.name], label=run.name)
        loss.plot(tokens, run.column("loss"), style, color=COLORS[run.name], label=run.name)
    rate.set(yscale="log", ylabel="learning rate", title="Continued pretraining starts where pretraining ended")
    loss.set(ylabel="training loss, each on its own blend", xlabel="tokens (millions)")
    rate.legend(loc="lower left")
    draw_changes(change, [row for row in rows if not row["mean"]])
    figure.savefig(path, dpi=130)


def shade_phases(axes: Axes, recipe: RunMetrics, offset: float) -> None:
    """Shade and name the recipe's phases, with a line at each change of the blend."""
    left = offset / 1e6
    for index, (name, last_step) in enumerate(recipe.phases.items()):
        right = (offset + last_step * recipe.tokens_per_step) / 1e6
        axes.axvspan(left, right, color=PHASE_SHADES[index % 2], zorder=0)
        axes.text((left + right) / 2, 0.97, name, transform=axes.get_xaxis_transform(), ha="center", va="top")
        if index:
            axes.axvline(left, color="black", linewidth=1, linestyle=":")
        left = right


def draw_changes(axes: Axes, rows: Sequence[dict[str, Any]]) -> None:
    """Draw the change of the held-out loss since the base model, one pair of bars per domain."""
    places = np.arange(len(rows))
    for shift, name in ((-0.2, "baseline"), (0.2, "recipe")):
        changes = [row[name] - row["before"] for row in rows]
        bars = axes.bar(places + shift, changes, width=0.38, color=COLORS[name], label=name)
        axes.bar_label(bars, fmt="%+.3f", fontsize=7, padding=2)
    axes.axhline(0, color="black", linewidth=0.8)
    axes.margins(y=0.12)
    axes.set_xticks(places, [row["domain"] for row in rows])
    axes.set(ylabel="change of held-out loss", title="Held-out loss since the base model (down is better)")
    axes.legend()
