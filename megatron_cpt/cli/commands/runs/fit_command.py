"""Command `fit`: a law of the held-out loss, from finished small runs."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

RUNS_HELP = "Run directories with the same model and trunk, of at least 4 arms: different blends and learning rates."
OUTPUT_HELP = "The file to write, for `plan RUN.yaml --predict FIT.json`."


def fit(
    run_directories: Annotated[list[Path], typer.Argument(metavar="RUN_DIR ...", help=RUNS_HELP)],
    output: Annotated[Path, typer.Option("--output", metavar="FIT.json", help=OUTPUT_HELP)],
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing file that is no fit.")] = False,
) -> None:
    """Fit held-out loss against learning rate, tokens and blend, from finished small runs that start from one trunk.

    Prints the error of each held-out source, found by omitting all runs of one arm at a time.
    """
    from megatron_cpt.law.finished_runs import read_finished_runs
    from megatron_cpt.law.fit_runs import fit_runs
    from megatron_cpt.law.law_file import check_law_output, law_to_dict, write_law
    from megatron_cpt.views.prediction_table import render_fit

    check_law_output(output, run_directories, overwrite=overwrite)
    law = fit_runs(read_finished_runs(run_directories))
    write_law(output, law)
    render_fit(law_to_dict(law), sys.stdout)
    print(output)
