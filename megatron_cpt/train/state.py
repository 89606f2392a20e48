"""All that changes from step to step and must survive a restart, in one place."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass
class TrainState:
    """Where a run stands.

    Attributes:
        step: steps done; the next one is `step + 1`.
        tokens: tokens trained on.
        samples_by_source: samples each source has given since the start.
        data: the blend's state after `step`, as its cursor wants it back.
    """

    step: int = 0
    tokens: int = 0
    samples_by_source: dict[str, int] = field(default_factory=dict)
    data: dict[str, Any] | None = None

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
        }

    @classmethod
    def from_dict(cls, plain: dict[str, Any]) -> TrainState:
        """The inverse of `to_dict`."""
        return cls(plain["step"], plain["tokens"], plain["samples_by_source"], plain["data"])
