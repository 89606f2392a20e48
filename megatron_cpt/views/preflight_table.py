"""What a resume finds the same, what changed, and what that does, for a person to read."""

from __future__ import annotations

import io
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table

from megatron_cpt.checkpoint.preflight import DATA, RULES, SPANS, Change

# Where in the run a change shows; what is in none of them (the model, the precision) says so in its own row.
_SHOWS_IN = {
    "samples": ("seq_length", "batch", "seed", "ramp_up", "phase_length", "phase_batch", "blend", "data", "documents"),
    "rate": ("schedule",),
    "optimizer": ("optimizer",),
}


@dataclass(frozen=True)
class ResumeSummary:
    """Where a run goes on.

    Attributes:
        step: the first step that it will do.
        samples: samples that were read before, by source.
        rate: the learning rate of that step.
        saved_rate: what it would have been in the run as it was saved; None where that was not written down.
    """

    step: int
    samples: Mapping[str, int]
    rate: float
    saved_rate: float | None


def describe(changes: Sequence[Change], allow: Collection[str], going_on: ResumeSummary, *, width: int = 110) -> str:
    """One line where nothing changed, else a table of everything that was compared and what follows from it."""
    names = [rule.name for rule in (SPANS, *RULES, DATA)]
    effects = _effects(changes, going_on)
    if not changes:
        return f"preflight: nothing changed ({', '.join(names)}); " + "; ".join(
            f"{name}: {effect}" for name, effect in effects.items()
        )
    table = Table(title="preflight: the run as it was saved, and as it is now", title_justify="left")
    for column in ("", "", "what", "effect"):
        table.add_column(column)
    same = [name for name in names if name not in {change.rule.name for change in changes}]
    for change in changes:
        verdict = "allowed" if change.rule.name in allow else "refused"
        table.add_row(change.rule.name, verdict, change.what, change.rule.effect)
    table.add_section()
    table.add_row("the rest", "same", ", ".join(same), "")
    text = io.StringIO()
    Console(file=text, width=width, no_color=True).print(table)
    lines = (line.rstrip() for line in text.getvalue().splitlines())
    return "\n".join([*lines, *(f"{name}: {effect}" for name, effect in effects.items())])


def _effects(changes: Sequence[Change], going_on: ResumeSummary) -> dict[str, str]:
    """What becomes of samples, rate and optimizer."""
    changed = {
        part: [change.rule.name for change in changes if change.rule.name in names] for part, names in _SHOWS_IN.items()
    }
    follow = _by(changed["samples"]) if changed["samples"] else "the next follow in the same order"
    samples = f"{sum(going_on.samples.values()):,} are read; {follow}"
    rate = f"{going_on.rate:.4g} at step {going_on.step:,}"
    if going_on.saved_rate is not None and going_on.saved_rate != going_on.rate:
        rate += f", would have been {going_on.saved_rate:.4g}"
    optimizer = "moments and step go on" + (f"; {_by(changed['optimizer'])}" if changed["optimizer"] else "")
    return {"samples": samples, "rate": rate, "optimizer": optimizer}


def _by(names: Sequence[str]) -> str:
    return f"what follows is changed by {', '.join(names)}"
