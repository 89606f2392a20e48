"""Table of the changes between a saved run and the run that resumes from it, with their effects."""

from __future__ import annotations

import io
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from rich.table import Table

from megatron_cpt.checkpoint.preflight import DATA, RULES, RUN, SPANS, Change
from megatron_cpt.views.plan_table import print_parts

# Rules by the part of the run that they change; other rules (model, precision) have their effect in their own row.
_RULES_BY_PART = {
    "samples": ("seq_length", "batch", "seed", "ramp_up", "phase_length", "phase_batch", "blend", "data", "documents"),
    "rate": ("schedule",),
    "optimizer": ("optimizer",),
}


@dataclass(frozen=True)
class ResumeSummary:
    """State from which a run resumes.

    Attributes:
        step: first step after the checkpoint.
        samples: samples already read, by source.
        rate: learning rate of `step`.
        saved_rate: learning rate of `step` in the saved run; None if the checkpoint does not record it.
    """

    step: int
    samples: Mapping[str, int]
    rate: float
    saved_rate: float | None


def describe(changes: Sequence[Change], allow: Collection[str], summary: ResumeSummary) -> str:
    """Return one line if nothing changed, else a table of all compared settings, changes and effects.

    `allow` has the names of the rules that the user allowed to change.
    """
    names = [rule.name for rule in (SPANS, *RULES, DATA, RUN)]
    effects = _effects(changes, summary)
    if not changes:
        return "; ".join([f"preflight: nothing changed ({', '.join(names)})", *effects])
    table = Table(title="preflight: changes since the checkpoint", title_justify="left")
    for column in ("", "", "what", "effect"):
        table.add_column(column)
    unchanged = [name for name in names if name not in {change.rule.name for change in changes}]
    for change in changes:
        verdict = "allowed" if change.rule.name in allow else "refused"
        table.add_row(change.rule.name, verdict, change.what, change.rule.effect)
    table.add_section()
    table.add_row("the rest", "same", ", ".join(unchanged), "")
    text = io.StringIO()
    print_parts(text, [table], width=110)
    return text.getvalue() + "\n".join(effects)


def _effects(changes: Sequence[Change], summary: ResumeSummary) -> list[str]:
    """Return the effects of the changes on samples, learning rate and optimizer."""
    changed = {
        part: [change.rule.name for change in changes if change.rule.name in names]
        for part, names in _RULES_BY_PART.items()
    }
    order = f"changed by {', '.join(changed['samples'])}" if changed["samples"] else "unchanged"
    samples = f"{sum(summary.samples.values()):,} already read, the next ones {order}"
    rate = f"{summary.rate:.4g} at step {summary.step:,}"
    if summary.saved_rate is not None and summary.saved_rate != summary.rate:
        rate += f", {summary.saved_rate:.4g} without the changes"
    optimizer = "moments and step continue"
    if changed["optimizer"]:
        optimizer += f", with changes by {', '.join(changed['optimizer'])}"
    return [f"samples: {samples}", f"rate: {rate}", f"optimizer: {optimizer}"]
