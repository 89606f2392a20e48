"""Section `resilience` of run.yaml: time limits, hangs, loss spikes and comparison of replicas."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from megatron_cpt.config.quantities import Duration, Section


class SpikeConfig(Section):
    """Reaction to a loss far above the previous losses."""

    action: Literal["off", "warn", "skip", "stop"] = "warn"
    """`warn` records the spike, `skip` also skips the update, `stop` also ends the run without saving."""
    sigma: float = Field(6.0, gt=0)
    """Threshold in standard deviations above the mean loss of the window."""
    window: int = Field(128, ge=4)
    """Steps over which mean and deviation are computed; each phase starts with an empty window."""
    warmup: int | None = Field(None, ge=2)
    """Losses that the window must hold before a spike can be found; null means half the window."""

    @property
    def num_needed(self) -> int:
        """Losses needed before a spike can be found, with the default filled in."""
        return self.warmup if self.warmup is not None else self.window // 2


class ResilienceConfig(Section):
    """Time limits, hangs, dead ranks, bad steps, silent corruption."""

    wall_time: Duration | None = None
    """Save and end with status 75 before the process has run this long (3h50m, 1d12h, 90s); null sets no limit."""
    hang_timeout: Duration | None = 1800.0
    """Time without progress after which all ranks print their stacks and end with status 1; null waits forever."""
    peer_timeout: Duration | None = 120.0
    """Time without a heartbeat of a rank after which the other ranks end with status 1; null never checks."""
    stop_after: int = Field(5, gt=0)
    """Consecutive skipped updates after which the run ends with status 1."""
    spike: SpikeConfig = Field(default_factory=SpikeConfig)
    """Loss spikes."""
    verify_data: bool = False
    """Compare all sources with the content hashes in their PREFIX.json before the first step; reads every byte once."""
    parameter_hash_every: int | None = Field(None, gt=0)
    """Steps between bitwise comparisons of data-parallel replicas, also done before each save; null never compares."""
    straggler: bool = False
    """Report slow ranks; needs GPUs and nvidia-resiliency-ext."""
