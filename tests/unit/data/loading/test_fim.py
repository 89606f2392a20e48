"""Fill-in-the-middle: length, reversibility, rates, and dependence on the key."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_cpt.config import FimConfig
from megatron_cpt.data.loading.fim import FillInMiddle, fill_in_middle
from megatron_cpt.data.loading.stream import TokenStream
from megatron_cpt.errors import UserError

PREFIX, MIDDLE, SUFFIX, EOD = 1001, 1002, 1003, 0
ALWAYS = FillInMiddle(1.0, 0.5, PREFIX, MIDDLE, SUFFIX, EOD)


def undo(piece: list[int]) -> tuple[str, list[int]]:
    """Undo a rearranged piece by the definition of the two orders; also return which order it has."""
    if not piece or piece[0] != PREFIX:
        return "plain", piece
    before, after = piece[1 : piece.index(MIDDLE)], piece[piece.index(MIDDLE) + 1 :]
    at = before.index(SUFFIX)
    prefix, suffix = before[:at], before[at + 1 :]
    if prefix or at:  # PSM: the middle comes last and the suffix belongs behind it
        return "psm", prefix + after + suffix
    return "spm", after + suffix


def pieces(sample: list[int]) -> list[list[int]]:
    found: list[list[int]] = [[]]
    for token in sample:
        if token == EOD:
            found.append([])
        else:
            found[-1].append(token)
    return found


documents = st.lists(st.lists(st.integers(1, 1000), max_size=12), min_size=1, max_size=8)


@given(
    documents=documents, key=st.integers(0, 2**64 - 1), spm_rate=st.sampled_from([0.0, 0.5, 1.0]), rate=st.floats(0, 1)
)
def test_length_is_kept_and_every_piece_that_fits_is_recoverable(documents, key, spm_rate, rate):
    sample = [token for document in documents for token in [*document, EOD]][:-1]
    fim = FillInMiddle(rate, spm_rate, PREFIX, MIDDLE, SUFFIX, EOD)
    found = fim.apply(np.array(sample, np.uint16), key)
    assert len(found) == len(sample)
    # with room at the end nothing is cut: every document comes back, and the order of documents is kept
    padded = fim.apply(np.array([*sample, EOD, *[EOD] * (3 * len(documents))], np.uint16), key)
    assert padded[: len(sample)].tolist() == found.tolist()
    assert [undo(piece)[1] for piece in pieces(padded.tolist())[: len(documents)]] == documents


def test_rates_are_those_asked_for():
    fim = FillInMiddle(0.3, 0.75, PREFIX, MIDDLE, SUFFIX, EOD)
    sample = np.array([5, 6, 7, 8, 9, EOD] * 10_000, np.int32)
    sample = np.append(sample, [EOD] * 30_000)
    kinds = [undo(piece)[0] for piece in pieces(fim.apply(sample, 3).tolist())[:10_000]]
    changed = 10_000 - kinds.count("plain")
    assert changed == pytest.approx(3_000, abs=4 * np.sqrt(10_000 * 0.3 * 0.7))
    # a PSM with an empty prefix (11 of the 36 pairs of cuts) looks like an SPM
    psm = changed * 0.25 * 25 / 36
    assert kinds.count("psm") == pytest.approx(psm, abs=4 * np.sqrt(psm))


def test_cuts_are_uniform_over_all_places_both_ends_included():
    fim = FillInMiddle(1.0, 0.0, PREFIX, MIDDLE, SUFFIX, EOD)
    sample = np.append(np.array([5, 6, EOD] * 9_000, np.int32), [EOD] * 27_000)
    shapes: dict[tuple[int, ...], int] = {}
    for piece in pieces(fim.apply(sample, 5).tolist())[:9_000]:
        at = (piece.index(SUFFIX), piece.index(MIDDLE))
        shapes[at] = shapes.get(at, 0) + 1
    # cuts (a, b) of 3 places each: 9 pairs, the unequal ones twice for the two orders they may be drawn in
    counts = sorted(shapes.values())
    assert len(counts) == 6
    assert counts[:3] == pytest.approx([1_000] * 3, rel=0.15)
    assert counts[3:] == pytest.approx([2_000] * 3, rel=0.15)


def test_nothing_is_touched_at_rate_zero():
    sample = np.arange(20)
    assert FillInMiddle(0.0, 0.5, PREFIX, MIDDLE, SUFFIX, EOD).apply(sample, 7) is sample


def test_ids_beyond_the_type_of_the_file():
    fim = FillInMiddle(1.0, 0.5, 70_001, 70_002, 70_003, EOD)
    assert 70_001 in fim.apply(np.array([1, 2, 3, 4], np.uint16), 1).tolist()


def test_is_pinned():
    # If this changes, a run that is resumed reads other samples than it would have: never update it.
    sample = np.array([1, 2, 3, 4, EOD, 5, 6, 7, 8, 9, 10, 11], np.int32)
    p, m, s = PREFIX, MIDDLE, SUFFIX
    assert ALWAYS.apply(sample, 40).tolist() == [p, s, 1, 2, 3, 4, m, EOD, p, 5, 6, s]
    assert ALWAYS.apply(sample, 41).tolist() == [p, s, 4, m, 1, 2, 3, EOD, p, s, 10, 11]


def test_a_stream_depends_on_seed_name_and_k_only(counting_dataset):
    dataset = counting_dataset("code", 900, 100)

    def stream(name: str = "code", seed: int = 1, fim: FillInMiddle | None = ALWAYS) -> TokenStream:
        return TokenStream(name, [dataset], seq_length=16, seed=seed, fim=fim)

    rows = [stream().read(k).tolist() for k in range(40)]
    assert [stream().read(k).tolist() for k in reversed(range(40))] == rows[::-1]
    assert {len(row) for row in rows} == {17}
    assert all(row[0] == PREFIX for row in rows)
    plain = [stream().read_plain(k).tolist() for k in range(40)]
    assert plain == [stream(fim=None).read(k).tolist() for k in range(40)]
    for row, before in zip(rows, plain, strict=True):  # no token of the files is 0: one piece, cut at its end
        kept = [token for token in row if token not in (PREFIX, MIDDLE, SUFFIX)]
        assert len(set(kept)) == len(kept) >= 14
        assert set(kept) <= set(before)
    assert rows != [stream(seed=2).read(k).tolist() for k in range(40)]
    n = dataset.num_tokens // 16
    assert stream().read(0).tolist() != stream().read(n).tolist()  # another epoch cuts elsewhere


class TestFromRunYaml:
    CONFIG = FimConfig(rate=0.3, spm_rate=1.0, prefix_id=PREFIX, middle_id=MIDDLE, suffix_id=SUFFIX)

    def test_values(self):
        assert fill_in_middle("code", self.CONFIG, EOD) == FillInMiddle(0.3, 1.0, PREFIX, MIDDLE, SUFFIX, EOD)
        assert fill_in_middle("code", None, None) is None

    @pytest.mark.parametrize(("eod_id", "says"), [(None, "has no end-of-document token"), (MIDDLE, "1002 is the end")])
    def test_mistakes(self, eod_id, says):
        with pytest.raises(UserError, match=rf"sources\.code\.fim: .*{says}"):
            fill_in_middle("code", self.CONFIG, eod_id)
