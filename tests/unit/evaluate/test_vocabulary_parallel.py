"""Log-probabilities and samples of one rank; tests/distributed compares several ranks with it."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch

from megatron_cpt.backend import process_groups
from megatron_cpt.config import ParallelConfig
from megatron_cpt.evaluate.requests import GenerationOptions

VOCAB = 11
PADDED = 16


@pytest.fixture(scope="module", autouse=True)
def _one_rank() -> Iterator[None]:
    with process_groups(ParallelConfig()):
        yield


def logits(rows: int) -> torch.Tensor:
    from megatron_cpt.evaluate.vocabulary_parallel import own_logits

    drawn = torch.randn(rows, PADDED, generator=torch.Generator().manual_seed(0))
    drawn[:, VOCAB:] = 50.0  # padding that would win
    return own_logits(drawn, VOCAB)


def test_log_probabilities_leave_out_padding() -> None:
    from megatron_cpt.evaluate.vocabulary_parallel import log_probabilities

    rows, targets = torch.tensor([0, 2, 2]), torch.tensor([3, 0, 10])
    expected = torch.log_softmax(logits(3)[:, :VOCAB].double(), -1)[rows, targets]
    torch.testing.assert_close(log_probabilities(logits(3), rows, targets).double(), expected, rtol=0, atol=1e-6)


def test_the_first_of_equal_logits_is_the_largest() -> None:
    from megatron_cpt.evaluate.vocabulary_parallel import largest_ids

    tied = torch.tensor([[0.0, 2.0, 1.0, 2.0], [3.0, 3.0, 3.0, 3.0]])
    assert largest_ids(tied).tolist() == [1, 0]


def test_samples_have_the_probabilities_of_the_options() -> None:
    from megatron_cpt.evaluate.vocabulary_parallel import draw, sampled_ids

    one = torch.tensor([[0.5, 0.2, 0.2, 0.1]]).log()
    draws = torch.tensor([draw(1, b"prompt", position) for position in range(4000)], dtype=torch.float64)

    def shares(**options: float) -> list[float]:
        ids = sampled_ids(one.expand(len(draws), -1), draws, GenerationOptions(**{"temperature": 1.0, **options}))
        return (torch.bincount(ids, minlength=4) / len(draws)).tolist()

    assert shares() == pytest.approx([0.5, 0.2, 0.2, 0.1], abs=0.03)
    assert shares(top_k=2) == pytest.approx([5 / 7, 2 / 7, 0, 0], abs=0.03)
    assert shares(top_p=0.6) == pytest.approx([5 / 7, 2 / 7, 0, 0], abs=0.03)
    assert shares(top_p=0.01) == [1, 0, 0, 0]
    cold = [share**2 / 0.34 for share in (0.5, 0.2, 0.2, 0.1)]
    assert shares(temperature=0.5) == pytest.approx(cold, abs=0.03)


def test_a_draw_is_never_padding() -> None:
    from megatron_cpt.evaluate.vocabulary_parallel import sampled_ids

    largest_draw = torch.tensor([1 - 2**-53] * 3, dtype=torch.float64)
    assert (sampled_ids(logits(3), largest_draw, GenerationOptions(temperature=1.0)) < VOCAB).all()


def test_logits_of_a_diverged_model_give_no_id() -> None:
    from megatron_cpt.evaluate.vocabulary_parallel import largest_ids, sampled_ids

    broken = torch.full((2, VOCAB), float("nan"))
    broken[1, :3] = torch.tensor([1.0, float("inf"), 2.0])
    assert largest_ids(broken).tolist() == [-1, -1]
    draws = torch.tensor([0.0, 0.9], dtype=torch.float64)
    assert sampled_ids(broken, draws, GenerationOptions(temperature=1.0)).tolist() == [-1, -1]


def test_the_smallest_temperature_is_greedy() -> None:
    from megatron_cpt.evaluate.vocabulary_parallel import largest_ids, sampled_ids

    draws = torch.tensor([0.99] * 3, dtype=torch.float64)
    assert sampled_ids(logits(3), draws, GenerationOptions(temperature=1e-310)).equal(largest_ids(logits(3)))


@pytest.mark.parametrize("top_k", [1, 4, VOCAB])
def test_most_likely_ids_have_their_log_probabilities_and_the_rest_of_the_mass(top_k: int) -> None:
    from megatron_cpt.evaluate.vocabulary_parallel import most_likely

    ids, log_probs, log_tail = most_likely(logits(5), top_k)
    expected = torch.log_softmax(logits(5)[:, :VOCAB].double(), -1).sort(dim=-1, descending=True)
    assert ids.tolist() == expected.indices[:, :top_k].tolist()
    torch.testing.assert_close(log_probs.double(), expected.values[:, :top_k], rtol=0, atol=1e-6)
    torch.testing.assert_close(log_tail.double(), expected.values[:, top_k:].logsumexp(-1), rtol=0, atol=1e-6)


def test_a_tail_below_the_rounding_of_1_keeps_its_digits() -> None:
    from megatron_cpt.evaluate.vocabulary_parallel import most_likely

    _, _, log_tail = most_likely(torch.tensor([[0.0, -40.0, -41.0]]), 1)
    assert log_tail.item() == pytest.approx(-40 + math.log(1 + math.exp(-1)), rel=1e-6)
