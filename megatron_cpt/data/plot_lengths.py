"""How long the documents of a data set are, as a picture."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_cpt.config import format_count
from megatron_cpt.data.inspect import Summary
from megatron_cpt.errors import UserError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_INK, _FAINT, _GRID = "#1f2430", "#6b7280", "#e5e7eb"
_DOCUMENTS, _TOKENS = "#7aa6d8", "#f6b26b"


def plot_lengths(summary: Summary, path: str | Path) -> None:
    """Draw documents and tokens by length of document into a PNG (or whatever the ending of `path` names).

    Raises:
        UserError: the file cannot be written, or not in this format.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    style: dict[Any, Any] = {"font.size": 10, "text.color": _INK, "axes.labelcolor": _INK, "axes.edgecolor": _FAINT}
    style |= {"xtick.color": _FAINT, "ytick.color": _FAINT, "axes.spines.top": False, "axes.spines.right": False}
    style |= {"text.parse_math": False}  # a path may hold a dollar sign
    with matplotlib.rc_context(style):
        figure, (above, below) = pyplot.subplots(2, 1, figsize=(10, 6.4), sharex=True, layout="constrained")
        _draw_bars(above, [entry.documents for entry in summary.histogram], "documents", _DOCUMENTS)
        _draw_bars(below, [entry.tokens for entry in summary.histogram], "tokens in them", _TOKENS)
        labels = [f"{entry.low:,}" for entry in summary.histogram]
        below.set_xticks([place - 0.5 for place in range(len(labels))], labels)
        below.set_xlabel("tokens of a document")
        title = f"{summary.prefix}: {format_count(summary.documents)} documents, {format_count(summary.tokens)} tokens"
        above.set_title(title, loc="left", fontsize=13, fontweight="bold")
        try:
            figure.savefig(path, dpi=150)
        except OSError as error:
            raise UserError(f"--plot {path}: cannot be written: {error.strerror}") from error
        except ValueError as error:
            raise UserError(f"--plot {path}: {error}") from error
        finally:
            pyplot.close(figure)


def _draw_bars(axes: Axes, heights: list[int], label: str, color: str) -> None:
    axes.bar(range(len(heights)), heights, width=0.94, color=color)
    axes.set_ylabel(label)
    axes.yaxis.set_major_formatter(lambda value, _: format_count(value))
    axes.grid(axis="y", color=_GRID)
    axes.set_axisbelow(True)
