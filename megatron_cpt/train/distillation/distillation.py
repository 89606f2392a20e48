"""Distillation during training: the model's loss of each micro-batch is compared with a teacher."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from megatron_cpt.checkpoint.state.state_dicts import unwrap
from megatron_cpt.config import RunConfig
from megatron_cpt.planning.cost.teacher_cost import CPU_PIECE_ELEMENTS, PIECE_ELEMENTS
from megatron_cpt.train.device_batch import DeviceBatch
from megatron_cpt.train.distillation.distilled_loss import (
    LossOptions,
    Targets,
    Teacher,
    VocabularyShard,
    distilled_losses,
    measured_divergence,
)


class Distillation:
    """Replaces the loss of the last model chunk while a training step runs.

    megatron-core computes the loss inside the model, so this is the only place where the student's logits exist.

    Args:
        teacher: gives the targets.
        chunks: the student's model chunks on this rank.
        config: the run; it has a `teacher` section.
        device: of the student.

    Attributes:
        is_distilled: (num_sources,) True for sources that are compared with the teacher.
        cross_entropy, divergence: of the newest micro-batch, in the shape of its labels; 0 if it is not distilled.
    """

    cross_entropy: torch.Tensor
    divergence: torch.Tensor

    def __init__(
        self, teacher: Teacher, chunks: Sequence[torch.nn.Module], config: RunConfig, device: torch.device
    ) -> None:
        section = config.teacher
        assert section is not None
        self.teacher = teacher
        self.is_distilled = torch.tensor([section.distills(name) for name in config.sources], device=device)
        weights = [section.weight_of(name) for name in config.sources]
        self._only_measures = not any(weights)
        self._weights = torch.tensor(weights, dtype=torch.float32, device=device)
        self._options = LossOptions(
            VocabularyShard.of(config.model),
            section.temperature,
            config.model.padding_in_softmax,
            CPU_PIECE_ELEMENTS if device.type == "cpu" else PIECE_ELEMENTS,
        )
        self._step: Iterator[Targets | None] | None = None
        self._targets: Targets | None = None
        self._sources = torch.empty(0)
        for chunk in chunks:
            if unwrap(chunk).post_process:
                self._replace_loss(unwrap(chunk))

    @contextlib.contextmanager
    def step(self, micro_batches: Sequence[DeviceBatch]) -> Iterator[None]:
        """Compare the micro-batches of a training step with the teacher; a collective call of a replica."""
        self._step = self.teacher.targets(micro_batches)
        try:
            yield
        finally:
            self._step = self._targets = None

    def expect(self, chunk: torch.nn.Module, sources: torch.Tensor) -> None:
        """Get the targets of the micro-batch that a chunk computes next; `sources` (b,) has one index per sample."""
        if self._step is not None and unwrap(chunk).post_process:
            self._sources, self._targets = sources, next(self._step)

    def _replace_loss(self, model: Any) -> None:
        own_loss = model.compute_language_model_loss

        def compute_language_model_loss(labels: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
            """Return the loss (b, s) of labels (b, s) and logits (s, b, columns of this rank)."""
            if self._step is None:  # a validation
                return own_loss(labels, logits)  # type: ignore[no-any-return]
            return self._loss(self._targets, labels, logits, own_loss)

        model.compute_language_model_loss = compute_language_model_loss

    def _loss(self, targets: Targets | None, labels: torch.Tensor, logits: torch.Tensor, own_loss: Any) -> torch.Tensor:
        by_position = labels.transpose(0, 1).contiguous()
        self.divergence = torch.zeros_like(labels, dtype=torch.float32)
        if targets is not None and not self._only_measures:
            weights = self._weights[self._sources]  # packed documents are one row of labels, and still b samples
            of_tokens = weights[:, None].expand(-1, labels.numel() // len(weights)).reshape(labels.shape)
            losses = distilled_losses(logits, by_position, of_tokens.transpose(0, 1), targets, self._options)
            self.cross_entropy, self.divergence = losses.cross_entropy.T, losses.divergence.T
            return losses.total.transpose(0, 1).contiguous()
        if targets is not None:  # before megatron-core overwrites the logits
            self.divergence = measured_divergence(logits, by_position, targets, self._options).T
        loss: torch.Tensor = own_loss(labels, logits)
        self.cross_entropy = loss.detach()
        return loss
