"""`megatron-cpt plan`: what a run will do, before anything runs."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

RUN_HELP = "The run.yaml."
OVERRIDES_HELP = "Values that replace those of the file, by dotted path: parallel.tensor=2 phases.general.until.lr=0.1"


def plan(
    run: Annotated[Path | None, typer.Argument(metavar="RUN.yaml", help=RUN_HELP, show_default=False)] = None,
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[key=value ...]", help=OVERRIDES_HELP)] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the plan as JSON.")] = False,
    plot: Annotated[Path | None, typer.Option("--plot", metavar="FILE.png", help="Also draw it.")] = None,
    gpus: Annotated[
        int | None, typer.Option("--gpus", metavar="N", min=1, help="GPUs to plan for; one replica.")
    ] = None,
    schema: Annotated[bool, typer.Option("--schema", help="Print the JSON schema of run.yaml, for editors.")] = False,
) -> None:
    """Show a run before it starts: steps, phases, learning rates, epochs, memory, FLOPs.

    Needs neither a GPU nor, where sources declare their `tokens`, the data.
    """
    if schema:
        from megatron_cpt.config import run_schema

        print(json.dumps(run_schema(), indent=2))
        return
    if run is None:
        raise typer.BadParameter("give the path of a run.yaml (or --schema)", param_hint="RUN.yaml")
    from megatron_cpt.data.resolve import prepare_run

    prepared = prepare_run(run, overrides or (), need_files=False, num_gpus=gpus)
    if plot is not None:
        from megatron_cpt.plan.plot import plot_plan

        plot_plan(prepared.plan, plot)
    if as_json:
        print(json.dumps(prepared.plan.to_dict(), indent=2, allow_nan=False))
        return
    from megatron_cpt.plan.render import render_plan

    render_plan(prepared.plan, sys.stdout)
