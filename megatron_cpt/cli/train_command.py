"""`megatron-cpt train`: one process of a run, alone or under torchrun."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from megatron_cpt.cli.plan_command import OVERRIDES_HELP, RUN_HELP

# the names of checkpoint/preflight.py, which a command that only prints help need not import; a test compares them
ALLOW_HELP = (
    "Changes since the checkpoint that are meant: ramp_up, phase_length, phase_batch, blend, schedule, optimizer, "
    "precision, tokenizer, documents, data."
)


def train(
    run: Annotated[Path, typer.Argument(metavar="RUN.yaml", help=RUN_HELP, show_default=False)],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[key=value ...]", help=OVERRIDES_HELP)] = None,
    allow: Annotated[list[str] | None, typer.Option("--allow", metavar="CHANGE ...", help=ALLOW_HELP)] = None,
) -> None:
    """Train, from the start or from the newest sound checkpoint of the run's output.

    One process without a launcher; under torchrun, one rank of many. Exit status 75: stopped by a signal after a
    checkpoint was saved.
    """
    from megatron_cpt.hooks import build_hooks
    from megatron_cpt.train.run import run_training

    raise typer.Exit(run_training(str(run), overrides or [], allow or [], build_hooks))
