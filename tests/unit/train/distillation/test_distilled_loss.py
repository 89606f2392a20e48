"""Losses and gradients in pieces of the logits equal torch's functions and its autograd."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch.nn import functional

from megatron_cpt.backend import process_groups
from megatron_cpt.config import ModelConfig, ParallelConfig

SIZES = {"layers": 1, "hidden": 8, "ffn_hidden": 8, "heads": 1}
POSITIONS, SAMPLES, VOCAB, PADDED = 7, 3, 29, 32


@pytest.fixture(scope="module", autouse=True)
def _groups() -> Iterator[None]:
    with process_groups(ParallelConfig()):
        yield


def _inputs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return logits (s, b, padded), labels and weights (s, b), states (s x b, 8) and a weight (padded, 8)."""
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(POSITIONS, SAMPLES, PADDED, generator=generator)
    labels = torch.randint(VOCAB, (POSITIONS, SAMPLES), generator=generator)
    weights = torch.tensor([0.0, 0.3, 1.0]).expand(POSITIONS, SAMPLES)
    states = torch.randn(POSITIONS * SAMPLES, 8, generator=generator)
    return logits, labels, weights, states, torch.randn(PADDED, 8, generator=generator)


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("padding_in_softmax", [False, True])
@pytest.mark.parametrize("piece_elements", [1, 5 * PADDED, 10**6])
def test_losses_and_gradient_equal_torch(temperature: float, padding_in_softmax: bool, piece_elements: int) -> None:
    from megatron_cpt.train.distillation import distilled_loss
    from megatron_cpt.train.distillation.online_teacher import OnlineTargets

    logits, labels, weights, states, output_layer = _inputs()
    shard = distilled_loss.VocabularyShard.of(ModelConfig(**SIZES, vocab=VOCAB, vocab_multiple=PADDED))
    assert (shard.first, shard.columns) == (0, VOCAB)
    wanted = logits.double().requires_grad_()
    masked = wanted if padding_in_softmax else wanted[..., :VOCAB]
    cross_entropy = functional.cross_entropy(masked.flatten(0, 1), labels.flatten(), reduction="none").view_as(labels)
    log_p = functional.log_softmax(states.double() @ output_layer[:VOCAB].double().T / temperature, dim=-1)
    log_q = functional.log_softmax(wanted[..., :VOCAB].flatten(0, 1) / temperature, dim=-1)
    divergence = functional.kl_div(log_q, log_p, reduction="none", log_target=True).sum(dim=-1).view_as(labels)
    total = (1 - weights) * cross_entropy + weights * temperature**2 * divergence
    mask = (labels != labels[0, 0]).double()
    (total * mask).sum().backward()

    leaf = logits.clone().requires_grad_()
    given = leaf * 1.0  # the logits are overwritten, which a leaf may not be
    if not padding_in_softmax:
        given = given.masked_fill(torch.arange(PADDED) >= VOCAB, float("-inf"))
    options = distilled_loss.LossOptions(shard, temperature, padding_in_softmax, piece_elements)
    targets = OnlineTargets(states, output_layer[: shard.columns], temperature)
    measured = distilled_loss.measured_divergence(given, labels, targets, options)
    losses = distilled_loss.distilled_losses(given, labels, weights, targets, options)
    (losses.total * mask.float()).sum().backward()
    torch.testing.assert_close(measured, divergence.detach().float())
    torch.testing.assert_close(losses.divergence, divergence.detach().float())
    torch.testing.assert_close(losses.cross_entropy, cross_entropy.detach().float())
    torch.testing.assert_close(losses.total.detach(), total.detach().float())
    assert leaf.grad is not None
    assert wanted.grad is not None
    torch.testing.assert_close(leaf.grad, wanted.grad.float(), rtol=1e-5, atol=1e-6)


def test_the_divergence_of_nearly_equal_models_is_far_below_the_rounding_of_one_logarithm() -> None:
    from megatron_cpt.train.distillation.online_teacher import OnlineTargets

    _, _, _, states, output_layer = _inputs()
    logits = states @ output_layer.T
    for noise in (0.0, 1e-7):
        student = logits * (1 + noise) + 1e3 * noise
        q, weights = functional.softmax(student, dim=-1), torch.ones(len(states))
        targets = OnlineTargets(states, output_layer, 1.0)
        divergence = targets.divergence(slice(0, len(states)), student, student.logsumexp(dim=-1), q, weights)
        assert divergence.abs().max() < 1e-7
        assert divergence.abs().mean() < 2e-8
        assert q.abs().max() < 1e-6, "the gradient"
