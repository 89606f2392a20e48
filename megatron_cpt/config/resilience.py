"""The section `resilience` of run.yaml: when a run stops by itself, and what it does about bad steps."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from megatron_cpt.config.quantities import Duration
from megatron_cpt.config.section import Section


def _word_off(value: Any) -> Any:
    return "off" if value is False else value  # YAML 1.1 reads a bare `off` as false


class SpikeConfig(Section):
    """What a loss far above those before it does."""

    action: Annotated[Literal["off", "warn", "skip", "stop"], BeforeValidator(_word_off)] = "warn"
    """warn: record it; skip: also leave the update out; stop: also end the run, without saving."""
    sigma: float = Field(6.0, gt=0)
    """Standard deviations above the mean of the window."""
    window: int = Field(128, ge=4)
    """Steps that mean and deviation are taken over; they start anew with each phase."""
    warmup: int | None = Field(None, ge=2)
    """Losses that must be in the window before the rule says anything; left out: half the window."""

    @property
    def num_needed(self) -> int:
        """Losses before the rule says anything."""
        return self.warmup if self.warmup is not None else self.window // 2


class ResilienceConfig(Section):
    """Limits, hangs, dead ranks, bad steps, silent corruption."""

    wall_time: Duration | None = None
    """Save and end with status 75 before this process has run so long: 3h50m, 1d12h or seconds."""
    hang_timeout: Duration | None = 1800.0
    """No progress for so long: dump the stacks of all ranks and end with status 1; null: never."""
    peer_timeout: Duration | None = 120.0
    """No sign of life of a rank for so long: the others end with status 1; null: never look."""
    stop_after: int = Field(5, gt=0)
    """Updates left out in a row after which the run ends with status 1."""
    spike: SpikeConfig = Field(default_factory=SpikeConfig)
    parameter_hash_every: int | None = Field(None, gt=0)
    """Steps between comparisons of the parameters' bits over the data-parallel replicas; also before each save."""
    straggler: bool = False
    """Report slow ranks (GPUs; nvidia-resiliency-ext)."""
