"""A training run in plain PyTorch over transformers' model classes and torch.optim.AdamW.

Written from the documents alone (docs/guide, docs/reference, arXiv 2407.07263); nothing of `megatron_cpt` is imported.
`megatron-cpt trace --json` gives the samples of each step; their tokens are read straight from the `.bin` files.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch.nn import functional

Sample = Mapping[str, Any]
"""One sample of `trace --json`: prefix, first_token, num_tokens, documents."""


@dataclass(frozen=True)
class Settings:
    """Settings of run.yaml, under its names."""

    steps: int
    max_lr: float
    min_lr: float
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.1
    clip_grad: float = 1.0
    reset_attention: bool = False
    reset_positions: bool = False
    eod_loss: bool = True
    spike: tuple[float, int, int] | None = None
    """sigma, window and warmup of `resilience.spike` with `action: skip`."""
    padding: int = 0
    """Rows of zeros after the vocabulary that take part in the softmax (`model.padding_in_softmax`)."""
    dtype: type = np.uint16


@dataclass(frozen=True)
class Step:
    """Phase and samples of a step."""

    phase: str
    samples: Sequence[Sample]


@dataclass
class Result:
    """Losses, gradient norms before clipping, and losses by source, one per step; and the steps without an update."""

    losses: list[float] = field(default_factory=list)
    grad_norms: list[float] = field(default_factory=list)
    by_source: list[dict[str, float]] = field(default_factory=list)
    skipped: list[int] = field(default_factory=list)


def rate(step: int, settings: Settings) -> float:
    """Return the learning rate of a step, counted from 1: a cosine at (step - 1) / steps."""
    progress = (step - 1) / settings.steps
    return settings.min_lr + 0.5 * (settings.max_lr - settings.min_lr) * (1 + math.cos(math.pi * progress))


def read_sample(sample: Sample, settings: Settings) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (num_tokens,) ids, and the number of each token's document."""
    tokens = np.memmap(f"{sample['prefix']}.bin", dtype=settings.dtype, mode="r")
    first, count = sample["first_token"], sample["num_tokens"]
    lengths = [part["num_tokens"] for part in sample["documents"]]
    assert sum(lengths) == count
    ids = torch.from_numpy(tokens[first : first + count].astype(np.int64))
    return ids, torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))


def token_losses(model: Any, sample: Sample, settings: Settings) -> torch.Tensor:
    """Return the losses of the positions of one sample that count."""
    ids, documents = read_sample(sample, settings)
    inputs, labels, own = ids[:-1], ids[1:], documents[:-1]
    length = len(inputs)
    positions = torch.arange(length)
    is_visible = positions[:, None] >= positions[None, :]
    if settings.reset_attention:
        is_visible = is_visible & (own[:, None] == own[None, :])
    if settings.reset_positions:
        starts = torch.tensor([int((own == number).nonzero()[0]) for number in own.tolist()])
        positions = positions - starts
    bias = torch.zeros(length, length).masked_fill(~is_visible, torch.finfo(torch.float32).min)
    logits = model(
        input_ids=inputs[None], position_ids=positions[None], attention_mask=bias[None, None], use_cache=False
    ).logits[0]
    logits = functional.pad(logits, (0, settings.padding))  # the logit of a row of zeros is 0
    losses = functional.cross_entropy(logits, labels, reduction="none")
    if not settings.eod_loss:
        # the next token belongs to another document: its first token is not predicted
        losses = losses[documents[1:] == own]
    return losses


def is_spike(loss: float, previous: Sequence[float], spike: tuple[float, int, int] | None) -> bool:
    """Return whether a loss is above mean + sigma x standard deviation of the previous losses of its phase."""
    if spike is None or len(previous) < spike[2]:
        return False
    recent = previous[-spike[1] :]
    return loss > np.mean(recent) + spike[0] * np.std(recent, ddof=1)


def train(model: Any, steps: Sequence[Step], settings: Settings) -> Result:
    """Train `model` in place, one entry of `steps` per step."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in parameters if p.dim() > 1], "weight_decay": settings.weight_decay},
            {"params": [p for p in parameters if p.dim() == 1], "weight_decay": 0.0},  # norms and biases
        ],
        betas=settings.betas,
        eps=settings.eps,
    )
    result = Result()
    phase, previous = "", []
    for number, step in enumerate(steps, start=1):
        optimizer.zero_grad(set_to_none=False)
        losses = [(sample["source"], token_losses(model, sample, settings)) for sample in step.samples]
        num_tokens = sum(len(values) for _, values in losses)
        mean = torch.stack([values.sum() for _, values in losses]).sum() / num_tokens
        mean.backward()
        norm = float(torch.nn.utils.clip_grad_norm_(parameters, settings.clip_grad))
        for group in optimizer.param_groups:
            group["lr"] = rate(number, settings)
        phase, previous = step.phase, previous if step.phase == phase else []
        if is_spike(mean.item(), previous, settings.spike):
            result.skipped.append(number)
        else:
            optimizer.step()
        previous.append(mean.item())
        result.losses.append(mean.item())
        result.grad_norms.append(norm)
        by_source = {name: torch.cat([values.detach() for own, values in losses if own == name]) for name, _ in losses}
        result.by_source.append({name: float(values.mean()) for name, values in by_source.items()})
    return result
