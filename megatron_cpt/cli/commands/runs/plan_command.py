"""Command `megatron-cpt plan`: steps, epochs, memory and time of a run, computed before it starts."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from megatron_cpt.errors import UserError

if TYPE_CHECKING:
    from megatron_cpt.prepare import PreparedRun

RUN_HELP = "Path of run.yaml."
OVERRIDES_HELP = "Override values of the file by dotted path: parallel.tensor=2 phases.general.until.lr=0.1"


def plan(
    run: Annotated[Path | None, typer.Argument(metavar="RUN.yaml", help=RUN_HELP, show_default=False)] = None,
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[key=value ...]", help=OVERRIDES_HELP)] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the plan as JSON.")] = False,
    plot: Annotated[
        Path | None, typer.Option("--plot", metavar="FILE.png", help="Also draw the plan; needs matplotlib.")
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
    predict: Annotated[
        Path | None,
        typer.Option("--predict", metavar="FIT.json", help="Add the held-out losses that a law of `fit` expects."),
    ] = None,
    blend: Annotated[
        list[str] | None,
        typer.Option("--blend", metavar="NAME=SHARE,...", help="Shares of a source in the last phase to predict too."),
    ] = None,
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
    if blend and predict is None:
        raise typer.BadParameter("needs --predict FIT.json", param_hint="--blend")
    shares = _parse_shares(blend or [])
    # With --advise the layout of run.yaml need not fit the GPUs.
    prepared = prepare_run(run, overrides or (), need_files=False, num_gpus=None if wants_advice else gpus)
    prediction = None if predict is None else _predict(predict, prepared, shares)
    if plot is not None:
        from megatron_cpt.views.plan_plot import plot_plan

        plot_plan(prepared.plan, plot, prediction)
    from megatron_cpt.planning.cluster.advise import advise
    from megatron_cpt.planning.cluster.estimate import find_gpu, place_on_cluster
    from megatron_cpt.views.advice_table import render_advice, render_cluster
    from megatron_cpt.views.plan_table import render_plan

    config, found, advice, cluster = prepared.config, prepared.plan, None, None
    if gpu is not None:
        kind = find_gpu(gpu, config)
        if wants_advice and gpus is not None:
            advice = advise(config, found, gpus, kind)
        else:
            cluster = place_on_cluster(config, found, kind, gpus)
    if as_json:
        estimates = {"advice": advice and advice.to_dict(), "cluster": cluster and cluster.to_dict()}
        values = found.to_dict() | {name: value for name, value in estimates.items() if value}
        values |= {"prediction": prediction} if prediction is not None else {}
        print(json.dumps(values, indent=2, allow_nan=False))
    elif advice is not None:
        render_advice(advice, sys.stdout)
    else:
        render_plan(found, sys.stdout)
        if cluster is not None:
            render_cluster(cluster, sys.stdout)
    if prediction is not None and not as_json:
        from megatron_cpt.views.prediction_table import render_prediction

        render_prediction(prediction, sys.stdout)


def _predict(path: Path, prepared: PreparedRun, shares: Mapping[str, Sequence[float]]) -> dict[str, Any]:
    from megatron_cpt.law.law_file import read_law
    from megatron_cpt.law.predict import predict_run

    return predict_run(read_law(path), prepared.config, prepared.plan, shares=shares).to_dict()


def _parse_shares(options: Sequence[str]) -> dict[str, list[float]]:
    """Return the shares of `--blend qa=0.1,0.2` per source."""
    found: dict[str, list[float]] = {}
    for option in options:
        name, separator, text = option.rpartition("=")
        try:
            shares = [float(part) for part in text.split(",")]
        except ValueError:
            shares = []
        if not (separator and name and shares and all(0 <= share < 1 for share in shares)):
            raise UserError(f"--blend {option}: give NAME=SHARE with shares from 0 to below 1, such as qa=0.1,0.2")
        found.setdefault(name, []).extend(shares)
    return found
