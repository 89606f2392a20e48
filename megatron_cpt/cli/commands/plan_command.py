"""Command `megatron-cpt plan`: steps, epochs, memory and time of a run, computed before it starts."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from megatron_cpt.prepare import PreparedRun

RUN_HELP = "Path of run.yaml."
OVERRIDES_HELP = "Override values of the file by dotted path: parallel.tensor=2 phases.general.until.lr=0.1"


def plan(
    run: Annotated[Path | None, typer.Argument(metavar="RUN.yaml", help=RUN_HELP, show_default=False)] = None,
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[key=value ...]", help=OVERRIDES_HELP)] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the plan as JSON.")] = False,
    plot: Annotated[
        Path | None, typer.Option("--plot", metavar="FILE.png", help="Also draw the plan; needs megatron-cpt[plot].")
    ] = None,
    gpus: Annotated[
        int | None,
        typer.Option("--gpus", metavar="N", min=1, help="Number of GPUs; default: one replica of the model."),
    ] = None,
    gpu: Annotated[
        str | None,
        typer.Option("--gpu", metavar="NAME", help="Type of the GPUs, for speed and time: a100, h100, h200, b200."),
    ] = None,
    wants_advice: Annotated[
        bool,
        typer.Option(
            "--advise", help="Rank the layouts that fit the GPUs by their estimated speed; needs --gpus and --gpu."
        ),
    ] = False,
    schema: Annotated[bool, typer.Option("--schema", help="Print the JSON schema of run.yaml, for editors.")] = False,
) -> None:
    """Show a run before it starts: steps, phases, learning rates, epochs, memory and FLOPs; with --gpu also its time.

    Needs no GPU, and no data if the sources declare their `tokens`.
    """
    if schema:
        from megatron_cpt.config import run_schema

        print(json.dumps(run_schema(), indent=2))
        return
    if run is None:
        raise typer.BadParameter("give the path of a run.yaml (or --schema)", param_hint="RUN.yaml")
    from megatron_cpt.prepare import prepare_run

    if wants_advice and (gpus is None or gpu is None):
        raise typer.BadParameter("needs --gpus N and --gpu NAME", param_hint="--advise")
    # With --advise the layout of run.yaml need not fit the GPUs.
    prepared = prepare_run(run, overrides or (), need_files=False, num_gpus=None if wants_advice else gpus)
    if plot is not None:
        from megatron_cpt.views.plan_plot import plot_plan

        plot_plan(prepared.plan, plot)
    if wants_advice:
        assert gpus is not None
        assert gpu is not None
        _advise(prepared, gpus, gpu, as_json)
        return
    from megatron_cpt.planning.cluster.estimate import find_gpu, place_on_cluster

    cluster = None
    if gpu is not None:
        cluster = place_on_cluster(prepared.config, prepared.plan, find_gpu(gpu, prepared.config), gpus)
    if as_json:
        values = prepared.plan.to_dict() | ({"cluster": cluster.to_dict()} if cluster else {})
        print(json.dumps(values, indent=2, allow_nan=False))
        return
    from megatron_cpt.views.plan_table import render_plan

    render_plan(prepared.plan, sys.stdout)
    if cluster is not None:
        from megatron_cpt.views.advice_table import render_cluster

        render_cluster(cluster, sys.stdout)


def _advise(prepared: PreparedRun, num_gpus: int, name: str, as_json: bool) -> None:
    from megatron_cpt.planning.cluster.advise import advise
    from megatron_cpt.planning.cluster.estimate import find_gpu
    from megatron_cpt.views.advice_table import render_advice

    config, plan = prepared.config, prepared.plan
    advice = advise(config, plan, num_gpus, find_gpu(name, config))
    if as_json:
        print(json.dumps({**plan.to_dict(), "advice": advice.to_dict()}, indent=2, allow_nan=False))
    else:
        render_advice(advice, sys.stdout)
