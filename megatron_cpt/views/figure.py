"""Style of all plots, and writing them to a file."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_cpt.errors import UserError, install_command

INK, FAINT, GRID = "#1f2430", "#6b7280", "#e5e7eb"


@contextlib.contextmanager
def save_figure(
    path: str | Path, size: tuple[float, float], *, rows: int = 2, sharex: bool = True, **subplots: Any
) -> Iterator[Any]:
    """Write panels, one above the other, to an image file.

    Args:
        path: the file; its extension decides the format, such as .png or .svg.
        size: width and height in inches.
        rows: number of panels.
        sharex: give all panels the same horizontal axis.
        subplots: further arguments of matplotlib's `subplots`.

    Yields:
        The axes from top to bottom, to draw on.

    Raises:
        UserError: if matplotlib is not installed, or the file cannot be written, or the format is unknown.
    """
    try:
        import matplotlib
    except ImportError as error:
        text = f"--plot {path}: plots need matplotlib, which cannot be imported: {error}"
        raise UserError(f"{text}; {install_command('plot')}") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    style: dict[Any, Any] = {"font.size": 10, "text.color": INK, "axes.labelcolor": INK, "axes.edgecolor": FAINT}
    style |= {"xtick.color": FAINT, "ytick.color": FAINT, "axes.spines.top": False, "axes.spines.right": False}
    style |= {"text.parse_math": False}  # a dollar sign in a name or path does not start a formula
    with matplotlib.rc_context(style):
        figure, axes = pyplot.subplots(rows, 1, figsize=size, sharex=sharex, layout="constrained", **subplots)
        try:
            yield axes
            _write(figure, path)
        finally:
            pyplot.close(figure)


def _write(figure: Any, path: str | Path) -> None:
    try:
        figure.savefig(path, dpi=150)
    except OSError as error:
        raise UserError(f"--plot {path}: cannot be written: {error.strerror}; choose another file") from error
    except ValueError as error:
        raise UserError(f"--plot {path}: {error}") from error
