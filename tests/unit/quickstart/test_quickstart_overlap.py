import pytest
from hypothesis import given
from hypothesis import strategies as st
from overlap import NGRAM_WORDS, HeldOutNgrams, ngrams

HELD_OUT = [f"held{i}" for i in range(40)]
OTHER = st.lists(st.sampled_from(["a", "b", "c"]), max_size=30)


@given(before=OTHER, after=OTHER, start=st.integers(0, 40 - NGRAM_WORDS))
def test_thirteen_shared_words_overlap_and_twelve_do_not(before, after, start):
    index = HeldOutNgrams([" ".join(HELD_OUT)])
    shared = HELD_OUT[start : start + NGRAM_WORDS]
    assert index.overlaps(" ".join([*before, *shared, *after]))
    assert not index.overlaps(" ".join([*before, *shared[:-1], *after]))


def test_case_and_punctuation_do_not_hide_an_overlap():
    index = HeldOutNgrams(["One two three four five six seven eight nine ten eleven twelve thirteen."])
    assert index.overlaps("ONE, two; three four five six seven eight nine: ten eleven -- twelve 'thirteen'")


def test_number_of_ngrams():
    assert len(list(ngrams(" ".join(HELD_OUT)))) == 40 - 13 + 1
    assert list(ngrams("Just three words")) == ["just three words"]


@pytest.mark.parametrize(("text", "expected"), [("a short one", True), ("not a short one", False), ("", False)])
def test_short_documents_overlap_only_when_equal(text, expected):
    assert HeldOutNgrams(["A short one!", "..."]).overlaps(text) is expected
