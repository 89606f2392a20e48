"""Records of a teacher: size, rounding, and detection of damage."""

from __future__ import annotations

import numpy as np
import pytest

from megatron_cpt.data.teacher_cache.top_k_records import RecordFormat, record_seeds


def make(layout: RecordFormat, count: int, key: int = 7):
    rng = np.random.default_rng(0)
    ids = np.stack([rng.permutation(layout.vocab)[: layout.top_k] for _ in range(count)])
    log_probs = np.log(rng.dirichlet(np.ones(layout.top_k), count) * 0.9)
    return layout.make(ids, log_probs, np.full(count, np.log(0.1)), record_seeds(key, 100, count)), ids, log_probs


@pytest.mark.parametrize(("vocab", "num_bytes"), [(257, 4 + 2 + 64 * 4), (1 << 16, 262), ((1 << 16) + 1, 390)])
def test_a_record_has_the_documented_size(vocab: int, num_bytes: int) -> None:
    assert RecordFormat(64, vocab).num_bytes == num_bytes


@pytest.mark.parametrize("vocab", [300, 100_000])
def test_ids_are_exact_and_log_probabilities_rounded_to_11_bits(vocab: int) -> None:
    records, ids, log_probs = make(RecordFormat(8, vocab), 50)
    assert (records["ids"] == ids).all()
    np.testing.assert_allclose(records["log_probs"], log_probs, rtol=2**-11)
    assert RecordFormat(8, vocab).is_intact(records, record_seeds(7, 100, 50)).all()


def test_impossible_tokens_get_the_lowest_number_instead_of_infinity() -> None:
    layout = RecordFormat(2, 10)
    records = layout.make(np.array([[1, 2]]), np.array([[0.0, -np.inf]]), np.array([-np.inf]), record_seeds(0, 0, 1))
    assert np.isfinite(records["log_probs"]).all()
    assert np.exp(records["log_tail"].astype(float)) == 0


def test_every_flipped_bit_and_every_other_place_is_found() -> None:
    layout = RecordFormat(4, 300)
    records = make(layout, 3)[0]
    for bit in range(8 * layout.num_bytes):
        damaged = records.copy()
        damaged.view(np.uint8).reshape(3, -1)[1, bit // 8] ^= 1 << bit % 8
        assert layout.is_intact(damaged, record_seeds(7, 100, 3)).tolist() == [True, False, True]
    assert not layout.is_intact(records, record_seeds(7, 101, 3)).any()
    assert not layout.is_intact(records, record_seeds(8, 100, 3)).all()
    assert not layout.is_intact(np.zeros(3, layout.dtype), record_seeds(7, 100, 3)).any()


def test_seeds_wrap_around_at_64_bits() -> None:
    assert record_seeds((1 << 64) - 2, 1, 3).tolist() == [(1 << 64) - 1, 0, 1]
