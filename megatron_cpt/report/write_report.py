"""Reports of runs, as files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from megatron_cpt.errors import CptError, UserError
from megatron_cpt.files.atomic import write_output
from megatron_cpt.files.output_path import file_problem
from megatron_cpt.provenance.protected_files import refuse_run_file
from megatron_cpt.report.build_page import build_page
from megatron_cpt.report.html_page import html_page
from megatron_cpt.report.run_record import RunReader

REPORT_FILE = "report.html"


def write_report(
    run_directory: str | Path, *, compare: Sequence[str | Path] = (), output: str | Path | None = None
) -> Path:
    """Write one HTML page about a run, made from its files.

    Example:
        >>> cpt.write_report("runs/recipe", compare=["runs/baseline"])
        PosixPath('runs/recipe/report.html')

    Args:
        run_directory: the run; it may still be training.
        compare: runs to compare it with.
        output: the page; None: report.html in the run directory.

    Returns:
        Path of the page.

    Raises:
        UserError: a folder holds no run.
        CptError: the page cannot be written.
    """
    readers = [RunReader(Path(folder)) for folder in (run_directory, *compare)]
    path = Path(output) if output is not None else Path(run_directory) / REPORT_FILE
    write_page(readers, path)
    return path


def write_page(readers: Sequence[RunReader], path: Path) -> None:
    """Write the page of runs that are read with readers of their own; see `write_report`."""
    check_output(path)
    write_report_file(path, html_page(build_page([reader.read() for reader in readers])))


def check_output(path: Path) -> None:
    """Raise UserError if a file cannot be at a path."""
    if not path.parent.is_dir():
        raise UserError(f"{path.parent}: no such folder; create it, or choose another output")
    if problem := file_problem(path):
        raise UserError(f"{path}: {problem}")
    refuse_run_file("--output", path)


def write_report_file(path: Path, text: str) -> None:
    """Write a report.

    Raises:
        CptError: it cannot be written.
    """
    try:
        write_output(path, text)
    except OSError as error:
        raise CptError(f"{path}: cannot be written: {error.strerror}; choose another output") from error
