"""How every picture looks, and how it is written."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_cpt.errors import UserError

INK, FAINT, GRID = "#1f2430", "#6b7280", "#e5e7eb"


@contextlib.contextmanager
def save_figure(path: str | Path, size: tuple[float, float], **subplots: Any) -> Iterator[Any]:
    """Two panels, one above the other, that are written as a PNG (or whatever the ending of `path` names).

    Args:
        path: where.
        size: width and height in inches.
        subplots: more arguments of matplotlib's `subplots`.

    Yields:
        The upper and the lower axes, to draw on.

    Raises:
        UserError: the file cannot be written, or not in this format.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    style: dict[Any, Any] = {"font.size": 10, "text.color": INK, "axes.labelcolor": INK, "axes.edgecolor": FAINT}
    style |= {"xtick.color": FAINT, "ytick.color": FAINT, "axes.spines.top": False, "axes.spines.right": False}
    style |= {"text.parse_math": False}  # names and paths may hold a dollar sign, which is no formula
    with matplotlib.rc_context(style):
        figure, axes = pyplot.subplots(2, 1, figsize=size, sharex=True, layout="constrained", **subplots)
        try:
            yield axes
            _write(figure, path)
        finally:
            pyplot.close(figure)


def _write(figure: Any, path: str | Path) -> None:
    try:
        figure.savefig(path, dpi=150)
    except OSError as error:
        raise UserError(f"--plot {path}: cannot be written: {error.strerror}") from error
    except ValueError as error:
        raise UserError(f"--plot {path}: {error}") from error
