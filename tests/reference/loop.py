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
    teacher_weights: Mapping[str, float] = field(default_factory=dict)
    """`teacher.weight` times its factor, by source; a source without an entry has no teacher."""
    temperature: float = 1.0


@dataclass(frozen=True)
class Step:
    """Phase and samples of a step."""

    phase: str
    samples: Sequence[Sample]


@dataclass
class Result:
    """Losses, gradient norms before clipping, and losses by source, one per step; and the steps without an update.

    The losses are cross entropies; `divergences` has their counterparts for the sources that have a teacher.
    """

    losses: list[float] = field(default_factory=list)
    grad_norms: list[float] = field(default_factory=list)
    by_source: list[dict[str, float]] = field(default_factory=list)
    divergences: list[dict[str, float]] = field(default_factory=list)
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


def token_logits(model: Any, sample: Sample, settings: Settings) -> tuple[torch.Tensor, torch.Tensor]:
    """Return logits (n, vocab) and labels (n,) of the positions of one sample that count."""
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
    if not settings.eod_loss:
        # the next token belongs to another document: its first token is not predicted
        counts = documents[1:] == own
        return logits[counts], labels[counts]
    return logits, labels


def divergences(logits: torch.Tensor, teacher: Any, sample: Sample, settings: Settings) -> torch.Tensor:
    """Return KL(teacher || student) of the positions of one sample that count, at the temperature."""
    with torch.no_grad():
        wanted = token_logits(teacher, sample, settings)[0]
    log_q, log_p = (functional.log_softmax(values / settings.temperature, dim=-1) for values in (logits, wanted))
    return functional.kl_div(log_q, log_p, reduction="none", log_target=True).sum(dim=-1)


def is_spike(loss: float, previous: Sequence[float], spike: tuple[float, int, int] | None) -> bool:
    """Return whether a loss is above mean + sigma x standard deviation of the previous losses of its phase."""
    if spike is None or len(previous) < spike[2]:
        return False
    recent = previous[-spike[1] :]
    return loss > np.mean(recent) + spike[0] * np.std(recent, ddof=1)


def train(model: Any, steps: Sequence[Step], settings: Settings, teacher: Any = None) -> Result:
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
        losses, distances, objectives = [], [], []
        for sample in step.samples:
            source, (logits, labels) = sample["source"], token_logits(model, sample, settings)
            losses.append((source, functional.cross_entropy(logits, labels, reduction="none")))
            objectives.append(losses[-1][1])
            if source in settings.teacher_weights:
                weight = settings.teacher_weights[source]
                distances.append((source, divergences(logits, teacher, sample, settings)))
                parts = (objectives[-1], distances[-1][1])
                objectives[-1] = (1 - weight) * parts[0] + weight * settings.temperature**2 * parts[1]
        mean = torch.cat(objectives).sum() / sum(map(len, objectives))
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
        result.losses.append(float(torch.cat([values.detach() for _, values in losses]).mean()))
        result.grad_norms.append(norm)
        result.by_source.append(_means(losses))
        result.divergences.append(_means(distances))
    return result


def _means(named: Sequence[tuple[str, torch.Tensor]]) -> dict[str, float]:
    """Return the mean over all tokens with the same name."""
    by_name = {name: torch.cat([values.detach() for own, values in named if own == name]) for name, _ in named}
    return {name: float(values.mean()) for name, values in by_name.items()}
