"""All that changes from step to step and must survive a restart, in one place."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from megatron_cpt.errors import RefusedError
from megatron_cpt.plan import RunPlan


@dataclass
class TrainState:
    """Where a run stands.

    Attributes:
        step: steps done; the next one is `step + 1`.
        tokens: tokens trained on.
        samples_by_source: samples each source has given since the start.
        data: the blend's state after `step`, as its cursor wants it back.
        skipped: steps whose update was left out.
        skipped_in_a_row: how many of them were the last ones.
        recent_losses: of the last steps of the phase, for the rule that finds spikes.
    """

    step: int = 0
    tokens: int = 0
    samples_by_source: dict[str, int] = field(default_factory=dict)
    data: dict[str, Any] | None = None
    skipped: int = 0
    skipped_in_a_row: int = 0
    recent_losses: list[float] = field(default_factory=list)

    def advance(self, tokens: int, samples_by_source: dict[str, int], data: dict[str, Any]) -> None:
        """Count one step."""
        self.step += 1
        self.tokens += tokens
        self.samples_by_source = samples_by_source
        self.data = data

    def to_dict(self) -> dict[str, Any]:
        """Plain values for state.json."""
        return {
            "step": self.step,
            "tokens": self.tokens,
            "samples_by_source": self.samples_by_source,
            "data": self.data,
            "skipped": self.skipped,
            "skipped_in_a_row": self.skipped_in_a_row,
            "recent_losses": self.recent_losses,
        }

    @classmethod
    def from_dict(cls, plain: dict[str, Any]) -> TrainState:
        """The inverse of `to_dict`."""
        return cls(
            plain["step"],
            plain["tokens"],
            plain["samples_by_source"],
            plain["data"],
            plain.get("skipped", 0),  # the last three came with format 1's later versions
            plain.get("skipped_in_a_row", 0),
            plain.get("recent_losses", []),
        )


def check_progress(state: TrainState, plan: RunPlan, where: str) -> None:
    """Refuse a plan under which the steps that are done would have read something else than they did.

    Changes of batch, ramp-up, schedule or phases may be allowed as long as they begin with the next step.

    Args:
        state: of a checkpoint.
        plan: under which the run is to go on.
        where: names the checkpoint.

    Raises:
        RefusedError: saying how much was read and how much it would be.
    """
    if state.data is None or state.step > plan.steps:
        return
    planned, samples = plan.after(state.step), int(state.data["sample"])
    if (planned.samples, planned.tokens) != (samples, state.tokens):
        raise RefusedError(
            f"{where}: its {state.step:,} steps read {samples:,} samples and {state.tokens:,} tokens; under this plan "
            f"they would be {planned.samples:,} and {planned.tokens:,}: batch, ramp-up or phases changed for steps "
            "that are done; change only what comes later, or start a new run with another output and init.from"
        )
