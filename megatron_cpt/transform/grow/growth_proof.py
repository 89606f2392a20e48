"""Proof of a growth: the logits of both models on the same tokens, computed by megatron-core in fp32."""

from __future__ import annotations

import math
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil
import torch

from megatron_cpt.checkpoint.loading.inference_model import open_checkpoint
from megatron_cpt.config import ModelConfig, format_bytes
from megatron_cpt.convert.logits import map_logits, random_prompts
from megatron_cpt.convert.mapping.shapes import expected_tensors
from megatron_cpt.errors import UserError

LIMITS = {torch.float32: 1e-5, torch.float16: 0.02, torch.bfloat16: 0.1}
"""Largest relative difference per dtype of the grown weights; rounding to the two short ones is not exact."""

_SPARE_BYTES = 1 << 30  # megatron-core, activations, logits, and buffers of the load


@dataclass(frozen=True)
class GrowthProof:
    """Difference between the logits of the small and the grown model.

    Attributes:
        relative_difference: largest absolute difference of any logit, divided by the largest absolute logit.
        limit: largest accepted value of it.
        top1_agreement: share of positions at which both models rank the same token first.
        num_tokens: number of positions that were compared, of random ids.
    """

    relative_difference: float
    limit: float
    top1_agreement: float
    num_tokens: int

    @property
    def holds(self) -> bool:
        """True if the difference is within the limit; a NaN is not."""
        return self.relative_difference <= self.limit

    def to_dict(self) -> dict[str, Any]:
        """Return the proof as plain values."""
        return asdict(self)


def prove_growth(small: Path, grown: Path, limit: float) -> GrowthProof:
    """Compute the logits of both checkpoints, one model after the other."""
    saved = open_checkpoint(small)
    model = ModelConfig.model_validate(saved.run["model"])
    prompts = random_prompts(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # megatron-core's, of what is not installed
        before, after = (
            torch.cat(map_logits(each, prompts, lambda logits, _: logits))[:, : model.vocab]
            for each in (saved, open_checkpoint(grown))
        )
    return GrowthProof(
        relative_difference=float((before - after).abs().max() / before.abs().max()),
        limit=limit,
        top1_agreement=float((before.argmax(-1) == after.argmax(-1)).float().mean()),
        num_tokens=len(before),
    )


def refuse_small_memory(target: ModelConfig) -> None:
    """Raise `UserError` if the grown model in fp32 does not fit into the memory that is free."""
    needed = 4 * sum(math.prod(shape) for shape in expected_tensors(target).values()) + _SPARE_BYTES
    free = psutil.virtual_memory().available
    if needed > free:
        raise UserError(
            f"the proof holds the grown model in memory, {format_bytes(needed)} in fp32, but {format_bytes(free)} are "
            "free; add --no-proof, or grow on a larger machine"
        )
