"""Command `experiment`: a grid of runs from one trunk, compared with confidence intervals."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from megatron_cpt.errors import EXIT_OK, UserError

if TYPE_CHECKING:
    from megatron_cpt.experiment.arms import Experiment, Unit
    from megatron_cpt.experiment.compare_arms import Comparison

FILE_HELP = "Path of EXPERIMENT.yaml."
PLAN_HELP = "Plan every arm and stop: tokens, switch steps, rates; with --gpu also GPU hours. Needs no data."
ENGINE_HELP = "Place of the runs: local, this machine; slurm, write a batch script; ray, tasks of a Ray cluster."
JOBS_HELP = "Runs at once [default: 1; with slurm and ray as many as there is room for]."
ONLY_HELP = "Train one run, and compare nothing; a task of SLURM or Ray calls this."
REPORT_HELP = "Compare the finished runs and train nothing."
RESTART_HELP = "Train runs again whose settings have changed; their files are kept in seed-S.before-1."
PLOT_HELP = "Also draw the differences from the baseline; needs matplotlib."
GPUS_HELP = "With --plan: number of GPUs per run; default: one replica of the model."
GPU_HELP = "With --plan: type of the GPUs, for hours: a100, h100, h200, b200."

_MOST_TABLES = 3  # on the terminal


def experiment(
    file: Annotated[Path, typer.Argument(metavar="EXPERIMENT.yaml", help=FILE_HELP, show_default=False)],
    plan_only: Annotated[bool, typer.Option("--plan", help=PLAN_HELP)] = False,
    engine: Annotated[Literal["local", "slurm", "ray"], typer.Option("--engine", help=ENGINE_HELP)] = "local",
    jobs: Annotated[int | None, typer.Option("--jobs", metavar="N", min=1, help=JOBS_HELP)] = None,
    ray_address: Annotated[
        str | None, typer.Option("--ray-address", metavar="ADDRESS", help="Cluster for --engine ray [default: local].")
    ] = None,
    only: Annotated[str | None, typer.Option("--only", metavar="ARM/seed-S", help=ONLY_HELP)] = None,
    report_only: Annotated[bool, typer.Option("--report-only", help=REPORT_HELP)] = False,
    restart_changed: Annotated[bool, typer.Option("--restart-changed", help=RESTART_HELP)] = False,
    plot: Annotated[Path | None, typer.Option("--plot", metavar="FILE.png", help=PLOT_HELP)] = None,
    gpus: Annotated[int | None, typer.Option("--gpus", metavar="N", min=1, help=GPUS_HELP)] = None,
    gpu: Annotated[str | None, typer.Option("--gpu", metavar="NAME", help=GPU_HELP)] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the result, or with --plan the plans, as JSON.")
    ] = False,
) -> None:
    """Train every arm of an experiment with every seed, and rank the arms with confidence intervals.

    Every arm is planned before anything runs. Run the same command again to resume: finished runs are kept. Exit status
    75: stopped by a signal after the runs have saved.
    """
    from megatron_cpt.experiment.arms import load_experiment

    _check_options(plan_only, only, report_only, gpu, gpus)
    found = load_experiment(file, need_files=not (plan_only or report_only))
    if plan_only:
        _show_plans(found, gpu, gpus, as_json)
        return
    units = _chosen(found, only)
    if not report_only:
        status = _run(found, units, engine, jobs, ray_address, restart_changed, is_single=only is not None)
        if status != EXIT_OK:
            raise typer.Exit(status)
    else:
        _warn_of_changes(units)
    if only is None and (report_only or engine != "slurm"):
        _show_results(found, plot, as_json)


def _check_options(plan_only: bool, only: str | None, report_only: bool, gpu: str | None, gpus: int | None) -> None:
    if plan_only + report_only + (only is not None) > 1:
        raise UserError("--plan, --only and --report-only exclude each other; give one of them")
    if (gpu or gpus) and not plan_only:
        raise UserError("--gpu and --gpus are for --plan; processes per run are the key `ranks`")


def _chosen(found: Experiment, only: str | None) -> list[Unit]:
    units = [unit for unit in found.units if only is None or unit.name == only]
    if not units:
        raise UserError(f"--only {only}: no such run; choose one of {', '.join(unit.name for unit in found.units)}")
    return units


def _warn_of_changes(units: list[Unit]) -> None:
    """Name finished runs that were trained with other settings or files than their arm has now."""
    from megatron_cpt.experiment.input_fingerprints import InputFingerprints
    from megatron_cpt.experiment.unit_result import changes_since_start

    fingerprints = InputFingerprints()
    for unit in units:
        if changes := changes_since_start(unit, fingerprints):
            _tell(f"warning: {unit.name} was trained with other settings or files: {'; '.join(changes[:3])}")


def _tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _run(
    found: Experiment,
    units: list[Unit],
    engine: str,
    jobs: int | None,
    ray_address: str | None,
    restart_changed: bool,
    *,
    is_single: bool,
) -> int:
    """Train the runs that have no result; return the exit status."""
    import contextlib

    from megatron_cpt.cli.missing_package import require_module
    from megatron_cpt.cli.progress import progress_bar
    from megatron_cpt.experiment.run_units import experiment_lock, train_units, unfinished_units

    with contextlib.nullcontext() if is_single else experiment_lock(found.output):
        left = unfinished_units(found, units, restart_changed=restart_changed, tell=_tell)
        if len(left) < len(units):
            _tell(f"{len(units) - len(left)} of {len(units)} runs are finished and kept")
        for unit in units:
            if found.output not in unit.folder.parents:
                _tell(f"{unit.name}: an equal run is finished, {unit.folder}")
        if not left:
            return EXIT_OK
        if engine == "slurm":
            from megatron_cpt.experiment.slurm_array import write_array

            path, command = write_array(found, left, jobs=jobs)
            print(f"{path}: {len(left)} tasks, one per run. Submit it, and compare the runs when they have ended:")
            print(f"  {command}\n  megatron-cpt experiment {found.path} --report-only")
            return EXIT_OK
        require_module("torch")  # before a run is started, which would fail in a process of its own
        if engine == "ray":
            from megatron_cpt.experiment.ray_tasks import run_on_ray

            require_module("ray")
            return run_on_ray(found, left, address=ray_address, jobs=jobs, tell=_tell)
        with progress_bar("training", sum(unit.plan.steps for unit in left)) as advance:
            return train_units(found, left, jobs=jobs or 1, tell=_tell, advance=advance)


def _show_plans(found: Experiment, gpu: str | None, gpus: int | None, as_json: bool) -> None:
    from megatron_cpt.planning.cluster.estimate import find_gpu, place_on_cluster
    from megatron_cpt.views.experiment_table import render_arms

    clusters = {}
    for name, run in found.prepared.items() if gpu is not None else ():
        clusters[name] = place_on_cluster(run.config, run.plan, find_gpu(gpu or "", run.config), gpus)
    plans = {name: run.plan for name, run in found.prepared.items()}
    if as_json:
        arms = {
            name: plan.to_dict() | ({"cluster": clusters[name].to_dict()} if name in clusters else {})
            for name, plan in plans.items()
        }
        print(json.dumps({"name": found.config.name, "seeds": found.config.seeds, "arms": arms}, indent=2))
    else:
        render_arms(plans, found.ranks, len(found.config.seeds), clusters, sys.stdout)


def _show_results(found: Experiment, plot: Path | None, as_json: bool) -> None:
    from megatron_cpt.experiment.compare_arms import compare_arms
    from megatron_cpt.experiment.experiment_page import ranking_cells, write_results
    from megatron_cpt.files.whole_io import read_text
    from megatron_cpt.views.experiment_table import render_rankings

    comparison = compare_arms(found)
    if not comparison.num_finished:
        raise UserError(f"{found.output}: no run is finished, so there is nothing to compare")
    paths = write_results(found, comparison)
    if plot is not None:
        _plot(comparison, plot)
        paths.append(plot)
    if as_json:
        print(read_text(paths[1]), end="")
        return
    rankings = [
        (
            f"{one.metric}, {one.unit}, {'lower' if one.is_lower_better else 'higher'} is better",
            [ranking_cells(row) for row in one.rows],
        )
        for one in comparison.rankings[:_MOST_TABLES]
    ]
    render_rankings(comparison.sentences(), rankings, sys.stdout)
    if len(comparison.rankings) > _MOST_TABLES:
        print(f"{len(comparison.rankings) - _MOST_TABLES} more metrics are in the report and the summaries:")
    print("\n".join(map(str, paths)))


def _plot(comparison: Comparison, path: Path) -> None:
    from megatron_cpt.views.experiment_plot import PlottedArm, plot_differences

    panels = {
        f"{one.metric}, {one.unit}: difference from {comparison.baseline}, {comparison.confidence:.0%} intervals": [
            PlottedArm(row.arm, row.difference.mean, row.difference.half_width, row.verdict)
            for row in one.rows
            if row.difference is not None and row.difference.num_seeds
        ]
        for one in comparison.rankings
    }
    plot_differences(comparison.name, panels, path)
