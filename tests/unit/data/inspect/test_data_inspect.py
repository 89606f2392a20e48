"""`summarize` compared with plain counting; single documents; plots."""

from __future__ import annotations

import numpy as np
import pytest

from megatron_cpt.data.inspect.summary import LengthBin, draw_histogram, get_document, summarize
from megatron_cpt.errors import UserError
from megatron_cpt.views.lengths_plot import plot_lengths


def test_summary_by_hand(make_dataset):
    summary = summarize(make_dataset("web", [[1], [2, 3, 4], [], [5, 6], [7, 8, 9, 10, 11]]))
    assert (summary.documents, summary.sequences, summary.tokens, summary.bytes) == (5, 5, 11, 22)
    assert (summary.mean, summary.shortest, summary.longest) == (2.2, 0, 5)
    assert summary.percentiles[50] == 2
    assert summary.histogram == (
        LengthBin(0, 0, 1, 0),
        LengthBin(1, 1, 1, 1),
        LengthBin(2, 3, 2, 5),
        LengthBin(4, 7, 1, 5),
    )


def test_summary_of_many_blocks(make_dataset, monkeypatch):
    monkeypatch.setattr("megatron_cpt.data.tokenfile.documents.BLOCK_DOCUMENTS", 10)
    lengths = np.random.default_rng(2).integers(1, 300, 500)
    summary = summarize(make_dataset("web", [range(length) for length in lengths]))
    assert summary.mean == pytest.approx(lengths.mean())
    for percentile, value in summary.percentiles.items():
        assert (lengths < value).mean() <= percentile / 100 <= (lengths <= value).mean()
    for entry in summary.histogram:
        inside = lengths[(lengths >= entry.low) & (lengths <= entry.high)]
        assert (entry.documents, entry.tokens) == (len(inside), inside.sum())
    assert sum(entry.documents for entry in summary.histogram) == 500


def test_gaps_in_the_histogram_stay(make_dataset):
    bins = summarize(make_dataset("web", [[1], range(9)])).histogram
    assert [(entry.low, entry.documents) for entry in bins] == [(1, 1), (2, 0), (4, 0), (8, 1)]


def test_nothing_in_it(make_dataset):
    summary = summarize(make_dataset("none", []))
    assert (summary.documents, summary.mean, summary.percentiles, summary.histogram) == (0, None, {}, ())
    assert draw_histogram(summary.histogram) == []


def test_drawing(make_dataset):
    bins = (LengthBin(1, 1, 1, 1), LengthBin(2, 3, 0, 0), LengthBin(4, 7, 1000, 6000))
    head, least, nothing, most = draw_histogram(bins, width=10)
    assert head.split() == ["tokens", "documents", "of", "tokens"]
    assert least.split() == ["1", "1", "0.0%", "▏"]
    assert nothing.split() == ["2", "to", "3", "0", "0.0%"]
    assert most.split() == ["4", "to", "7", "1,000", "100.0%", "█" * 10]


def test_document(make_dataset):
    dataset = make_dataset("web", [[1, 2], [], [3, 4, 5]])
    document = get_document(dataset, 2)
    assert (document.first_token, document.ids.tolist()) == (2, [3, 4, 5])
    assert get_document(dataset, 1).ids.tolist() == []
    for number in (3, -1):
        with pytest.raises(UserError, match=rf"no document {number}; they are 0 to 2"):
            get_document(dataset, number)


def test_plot(make_dataset, tmp_path):
    summary = summarize(make_dataset("we$b", [[1], [2, 3], range(40)]))
    plot_lengths(summary, tmp_path / "lengths.png")
    assert (tmp_path / "lengths.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(UserError, match=r"--plot .*cannot be written"):
        plot_lengths(summary, tmp_path / "none" / "lengths.png")
    with pytest.raises(UserError, match=r"--plot .*foo"):
        plot_lengths(summary, tmp_path / "lengths.foo")
