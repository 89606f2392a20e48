"""Divergence from a teacher's most likely tokens, against autograd on merged distributions."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from megatron_cpt.backend import process_groups
from megatron_cpt.config import ParallelConfig

TOKENS, VOCAB, TOP_K = 12, 40, 6


@pytest.fixture(scope="module", autouse=True)
def _one_rank() -> Iterator[None]:
    with process_groups(ParallelConfig()):
        yield


def draw(seed: int, scale: float = 2.0) -> torch.Tensor:
    return scale * torch.randn(TOKENS, VOCAB, generator=torch.Generator().manual_seed(seed))


def targets_of(teacher: torch.Tensor, top_k: int = TOP_K, dtype: torch.dtype = torch.float32):
    """Return the targets of a teacher's logits, as a cache would have them."""
    from megatron_cpt.train.distillation.cached_teacher import TopKTargets
    from megatron_cpt.train.distillation.distilled_loss import VocabularyShard

    log_probs, ids = torch.log_softmax(teacher, -1).sort(dim=-1, descending=True)
    tail = log_probs[:, top_k:].logsumexp(-1).clamp_min(torch.finfo(torch.float16).min)
    return TopKTargets(
        ids[:, :top_k].to(torch.uint16), log_probs[:, :top_k].to(dtype), tail.to(dtype), VocabularyShard(0, VOCAB)
    )


def compare(targets, rows: slice, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the divergence of some tokens and its gradient in the student's logits (n, VOCAB)."""
    q = torch.softmax(logits, -1)
    divergence = targets.divergence(rows, logits.clone(), logits.logsumexp(-1), q, torch.ones(len(q)))
    return divergence, q


def merged(log_probs: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Return the log-probabilities of the ids and of all other tokens together."""
    rest = log_probs.exp().scatter(1, ids, 0.0).sum(dim=1, keepdim=True)
    return torch.cat([log_probs.gather(1, ids), rest.log()], dim=1)


def test_divergence_and_gradient_equal_autograd() -> None:
    teacher, student = draw(0).double(), draw(1).double().requires_grad_()
    targets = targets_of(teacher.float())
    ids = targets.ids.long()
    log_p = merged(torch.log_softmax(teacher, -1), ids)
    expected = (log_p.exp() * (log_p - merged(torch.log_softmax(student, -1), ids))).sum(dim=1)
    expected.sum().backward()
    rows = slice(3, 9)
    divergence, gradient = compare(targets, rows, student.detach().float()[rows])
    torch.testing.assert_close(divergence.double(), expected.detach()[rows], rtol=1e-5, atol=1e-6)
    assert student.grad is not None
    torch.testing.assert_close(gradient.double(), student.grad[rows], rtol=1e-5, atol=1e-6)


def test_it_is_a_lower_bound_of_the_full_divergence_and_equal_to_it_with_all_tokens() -> None:
    log_p, log_q = torch.log_softmax(draw(0), -1), torch.log_softmax(draw(1), -1)
    full = (log_p.exp() * (log_p - log_q)).sum(dim=1)
    by_k = [compare(targets_of(draw(0), k), slice(None), draw(1))[0] for k in (1, 6, 20, VOCAB)]
    for smaller, larger in zip(by_k, [*by_k[1:], full], strict=True):
        assert (smaller <= larger + 1e-5).all()
    torch.testing.assert_close(by_k[-1], full, rtol=1e-5, atol=1e-6)


def test_a_student_equal_to_the_teacher_diverges_by_nothing_in_spite_of_fp16() -> None:
    for scale in (0.1, 2.0, 8.0):
        targets = targets_of(draw(0, scale), dtype=torch.float16)
        divergence, gradient = compare(targets, slice(None), draw(0, scale))
        assert divergence.abs().max() <= 1e-6
        assert gradient.abs().max() <= 1e-3


def test_a_student_without_a_tail_gives_finite_numbers() -> None:
    student = torch.full((TOKENS, VOCAB), -200.0)
    student[:, 0] = 0.0
    divergence, gradient = compare(targets_of(draw(0)), slice(None), student)
    assert torch.isfinite(divergence).all()
    assert torch.isfinite(gradient).all()


def test_a_sample_without_a_teacher_keeps_its_probabilities_to_the_bit() -> None:
    from megatron_cpt.train.distillation.cached_teacher import TopKTargets
    from megatron_cpt.train.distillation.distilled_loss import VocabularyShard

    zeros, ids = torch.zeros(TOKENS, TOP_K), torch.arange(TOP_K).expand(TOKENS, -1)
    targets = TopKTargets(ids.to(torch.uint16), zeros.half(), zeros[:, 0].half(), VocabularyShard(0, VOCAB))
    logits = draw(1)
    probabilities = torch.softmax(logits, -1)
    q = probabilities.clone()
    divergence = targets.divergence(slice(None), logits, logits.logsumexp(-1), q, torch.zeros(TOKENS))
    assert torch.isfinite(divergence).all()
    assert torch.equal(q, probabilities)
