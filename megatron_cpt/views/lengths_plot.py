"""Plot of the document lengths of a dataset."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from megatron_cpt.config import format_count
from megatron_cpt.data.inspect.summary import Summary
from megatron_cpt.views.figure import GRID, save_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_DOCUMENTS, _TOKENS = "#7aa6d8", "#f6b26b"


def plot_lengths(summary: Summary, path: str | Path) -> None:
    """Draw histograms of documents and tokens over document length into an image file.

    Raises:
        UserError: if matplotlib is not installed, or the file cannot be written, or the format is unknown.
    """
    with save_figure(path, (10, 6.4)) as (above, below):
        _draw_bars(above, [entry.documents for entry in summary.histogram], "documents", _DOCUMENTS)
        _draw_bars(below, [entry.tokens for entry in summary.histogram], "tokens", _TOKENS)
        labels = [f"{entry.low:,}" for entry in summary.histogram]
        below.set_xticks([place - 0.5 for place in range(len(labels))], labels)
        below.set_xlabel("tokens per document")
        title = f"{summary.prefix}: {format_count(summary.documents)} documents, {format_count(summary.tokens)} tokens"
        above.set_title(title, loc="left", fontsize=13, fontweight="bold")


def _draw_bars(axes: Axes, heights: list[int], label: str, color: str) -> None:
    axes.bar(range(len(heights)), heights, width=0.94, color=color)
    axes.set_ylabel(label)
    axes.yaxis.set_major_formatter(lambda value, _: format_count(value))
    axes.grid(axis="y", color=GRID)
    axes.set_axisbelow(True)
