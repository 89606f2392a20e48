"""Weights of a recipe: their proportions, and the limit of four epochs."""

from __future__ import annotations

import math

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from megatron_cpt.errors import UserError
from megatron_cpt.planning.timeline.epochs import divide_samples
from megatron_cpt.recipe.blend_weights import SizedSource, share_out, weigh_sources


def source(samples: int, factor: float = 1.0) -> SizedSource:
    return SizedSource(tokens=samples * 100, samples=samples, factor=factor)


def test_weights_follow_tokens_and_quality() -> None:
    weights = weigh_sources(
        {"web": source(6000), "books": source(2000, factor=2.0)},
        {"stem": source(300, factor=1.5), "chat": source(550)},
        general_samples=700,
        qa_samples=300,
    )
    assert weights.general == {"web": 0.6, "books": 0.4}
    assert weights.qa_phase == pytest.approx({"web": 0.54, "books": 0.36, "stem": 0.045, "chat": 0.055})
    assert weights.qa_share == 0.1
    assert not weights.cut
    assert weights.epochs["web"] == pytest.approx((0.6 * 700 + 0.54 * 300) / 6000)


def test_a_source_above_four_epochs_is_cut_and_the_others_share_the_rest() -> None:
    general = {"web": source(3000), "code": source(1000), "wiki": source(100, factor=10)}
    weights = weigh_sources(general, {"qa": source(100)}, general_samples=2000, qa_samples=1000)
    assert weights.cut == {"wiki"}
    # 4 x 100 - 2 samples of the 2,000 + 0.9 x 1,000 that are read of general sources
    assert weights.general["wiki"] == pytest.approx(398 / 2900, rel=1e-3)
    assert weights.general["web"] / weights.general["code"] == pytest.approx(3, rel=1e-3)
    assert weights.epochs["wiki"] <= 4


def test_little_qa_data_gets_less_than_a_tenth() -> None:
    qa = {"stem": source(2), "chat": source(10)}
    weights = weigh_sources({"web": source(5000)}, qa, general_samples=700, qa_samples=600)
    assert weights.cut == {"stem", "chat"}
    assert weights.qa_share == pytest.approx((6 + 38) / 600, rel=1e-3)
    assert weights.qa_phase["web"] == pytest.approx(1 - weights.qa_share)


def test_too_little_general_data_is_an_error() -> None:
    with pytest.raises(UserError, match=r"four epochs of the general sources are 4\d\.\d%"):
        weigh_sources({"web": source(100)}, {"qa": source(100)}, general_samples=700, qa_samples=300)


@example([(28762920, 1.0)], [(1, 1.0), (7711, 1.0), (1575124, 1.0)], 8, 121382967)
@given(
    st.lists(st.tuples(st.integers(1, 10**9), st.floats(0.01, 100)), min_size=1, max_size=6),
    st.lists(st.tuples(st.integers(1, 10**9), st.floats(0.01, 100)), min_size=1, max_size=6),
    st.integers(8, 10**9),
    st.integers(8, 10**9),
)
def test_weights_sum_to_one_and_no_source_exceeds_four_epochs(
    general: list[tuple[int, float]], qa: list[tuple[int, float]], general_samples: int, qa_samples: int
) -> None:
    sources = {f"g{n}": source(*entry) for n, entry in enumerate(general)}
    questions = {f"q{n}": source(*entry) for n, entry in enumerate(qa)}
    try:
        weights = weigh_sources(sources, questions, general_samples=general_samples, qa_samples=qa_samples)
    except UserError:
        return
    assert math.fsum(weights.general.values()) == pytest.approx(1, abs=1e-9)
    assert math.fsum(weights.qa_phase.values()) == pytest.approx(1, abs=1e-9)
    first, _ = divide_samples(weights.general, general_samples, {})
    second, _ = divide_samples(weights.qa_phase, qa_samples, {})
    for name, sized in (sources | questions).items():
        assert first.get(name, 0) + second[name] <= 4 * sized.samples
        assert weights.qa_phase[name] > 0


@given(st.dictionaries(st.text(min_size=1), st.tuples(st.floats(0.01, 1), st.floats(0.01, 1)), min_size=1))
def test_share_out_respects_every_limit(entries: dict[str, tuple[float, float]]) -> None:
    most = {name: limit for name, (_, limit) in entries.items()}
    total = math.fsum(most.values()) * 0.9
    given_shares = share_out({name: weight for name, (weight, _) in entries.items()}, most, total)
    assert math.fsum(given_shares.values()) == pytest.approx(total)
    assert all(share <= most[name] * (1 + 1e-12) for name, share in given_shares.items())
