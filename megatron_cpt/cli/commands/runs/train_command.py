"""`megatron-cpt train`: one process of a run, alone or under torchrun."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from megatron_cpt.cli.commands.runs.plan_command import OVERRIDES_HELP, RUN_HELP

# The names in checkpoint/preflight.py, which `--help` need not import; a test compares them.
ALLOW_HELP = (
    "Changes since the checkpoint that are intended: ramp_up, phase_length, phase_batch, blend, schedule, optimizer, "
    "precision, tokenizer, documents, teacher, data, run."
)
RESTART_HELP = (
    "Start from scratch where a run has lost its checkpoints; its files are kept in before-restart-1/. A run that "
    "has checkpoints resumes anyway."
)


def train(
    run: Annotated[Path, typer.Argument(metavar="RUN.yaml", help=RUN_HELP, show_default=False)],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[key=value ...]", help=OVERRIDES_HELP)] = None,
    allow: Annotated[list[str] | None, typer.Option("--allow", metavar="CHANGE ...", help=ALLOW_HELP)] = None,
    restart: Annotated[bool, typer.Option("--restart", help=RESTART_HELP)] = False,
) -> None:
    """Train a run, from its start or from the newest valid checkpoint in its output.

    Without a launcher it is one process; under torchrun, one rank of many. Exit status 75: stopped by a signal, by
    Ctrl-C or by resilience.wall_time after a checkpoint was saved; run the same command again to resume. A second
    Ctrl-C ends it without a save.
    """
    from megatron_cpt.launch.environment import set_cuda_variables

    set_cuda_variables()  # before torch is imported, which reads them
    from megatron_cpt.backend import launched_world_size
    from megatron_cpt.prepare import prepare_run
    from megatron_cpt.train.trainer import Trainer

    prepared = prepare_run(run, overrides or [], need_files=True, num_gpus=launched_world_size())
    with Trainer(prepared, allow=allow or [], restart=restart, console=True, owns_process=True) as trainer:
        result = trainer.fit()
    raise typer.Exit(result.status)
