"""State of a run that changes from step to step and survives a restart."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from megatron_cpt.errors import RefusedError
from megatron_cpt.planning import RunPlan


@dataclass
class TrainState:
    """Progress of a run.

    Attributes:
        step: steps done; the next one is `step + 1`.
        tokens: tokens trained on.
        samples_by_source: samples that each source has given since the start.
        data: state of the blend cursor after `step`.
        skipped: steps whose update was skipped.
        skipped_in_a_row: skipped updates since the last applied one.
        recent_losses: losses of the last steps of the phase, for the detection of spikes.
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
        """Return plain values for state.json."""
        return asdict(self)

    @classmethod
    def from_dict(cls, plain: dict[str, Any]) -> TrainState:
        """Restore the state from the values that `to_dict` returned."""
        optional = ("skipped", "skipped_in_a_row", "recent_losses")  # early checkpoints lack them
        required = {name: plain[name] for name in ("step", "tokens", "samples_by_source", "data")}
        return cls(**required, **{name: plain[name] for name in optional if name in plain})


def check_progress(state: TrainState, plan: RunPlan, checkpoint: str) -> None:
    """Refuse a plan under which the steps already done would have read other data.

    Changes of batch, ramp-up, schedule or phases may be allowed as long as they begin after `state.step`. Example:
    10 steps with a global batch of 8 have read 80 samples; a plan whose first 10 steps read 100 is refused.

    Raises:
        RefusedError: with the samples and tokens read, and those that the plan expects.
    """
    if state.data is None or state.step > plan.steps:
        return
    planned, samples = plan.after(state.step), int(state.data["sample"])
    if (planned.samples, planned.tokens) != (samples, state.tokens):
        raise RefusedError(
            f"{checkpoint}: its {state.step:,} steps read {samples:,} samples and {state.tokens:,} tokens; under this "
            f"plan they would be {planned.samples:,} and {planned.tokens:,}: batch, ramp-up or phases changed for "
            "steps already done; change only later steps, or start a new run with another output and init.from"
        )
