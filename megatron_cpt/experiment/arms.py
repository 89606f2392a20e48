"""Arms and runs of an experiment, every one of them planned before anything runs."""

from __future__ import annotations

import copy
import difflib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_cpt.checkpoint.layout import resolve_checkpoint
from megatron_cpt.config import RunConfig, format_count, read_mapping
from megatron_cpt.config.load_run import set_value
from megatron_cpt.errors import ConfigError, RefusedError
from megatron_cpt.experiment.equal_measurement import measurement_problems
from megatron_cpt.experiment.experiment_file import MEAN, ExperimentConfig, read_experiment
from megatron_cpt.experiment.input_fingerprints import InputFingerprints
from megatron_cpt.experiment.reuse_runs import find_equal_run
from megatron_cpt.planning import RunPlan
from megatron_cpt.prepare import PreparedRun, prepare_mapping


@dataclass(frozen=True)
class Unit:
    """One run of an experiment: an arm with a seed.

    Attributes:
        folder: its run directory.
        config: its complete run.yaml.
        source_tokens: tokens per source whose files are on this machine.
    """

    arm: str
    seed: int
    folder: Path
    config: RunConfig
    plan: RunPlan
    source_tokens: Mapping[str, int]

    @property
    def name(self) -> str:
        """Name for `--only` and messages: ARM/seed-S."""
        return f"{self.arm}/{self.folder.name}"

    @property
    def run_file(self) -> Path:
        """The run.yaml that `train` is started with, beside the run directory."""
        return self.folder.with_name(f"{self.folder.name}.yaml")

    @property
    def inputs_file(self) -> Path:
        """Fingerprints of the files that the run reads, written when it starts."""
        return self.folder.with_name(f"{self.folder.name}.inputs.json")

    @property
    def log_file(self) -> Path:
        """Output of `train`."""
        return self.folder.with_name(f"{self.folder.name}.log")


@dataclass(frozen=True)
class Metric:
    """Number that the arms are compared by: a mean over held-out sources, or a metric of a task.

    Attributes:
        sources: held-out sources whose losses are averaged; empty for a task.
        task: task of lm-evaluation-harness and its metric; None for held-out losses.
    """

    name: str
    sources: tuple[str, ...] = ()
    task: tuple[str, str] | None = None


@dataclass(frozen=True)
class Experiment:
    """Planned experiment.

    Attributes:
        path: the EXPERIMENT.yaml.
        prepared: per arm, the run with the first seed.
        units: all runs, arm by arm.
        metrics: the first one ranks the arms.
        ranks: processes per run, by arm.
    """

    path: Path
    config: ExperimentConfig
    prepared: Mapping[str, PreparedRun]
    units: Sequence[Unit]
    metrics: Sequence[Metric]
    ranks: Mapping[str, int]

    @property
    def output(self) -> Path:
        """Folder of the experiment."""
        return Path(self.config.output)

    @property
    def baseline(self) -> str:
        """Arm that the others are compared with."""
        return self.config.baseline or next(iter(self.config.arms))


def load_experiment(path: Path, *, need_files: bool) -> Experiment:
    """Read an EXPERIMENT.yaml and plan every arm.

    Args:
        need_files: require every file that training reads.

    Raises:
        UserError: a file cannot be read.
        ConfigError: with the problems of all arms.
        RefusedError: there is no such problem, but a dataset is damaged.
    """
    config = read_experiment(path)
    base = read_mapping(path.parent / config.base)
    prepared = _prepare_arms(path, config, base, need_files)
    problems = [*_token_problems(config, prepared)]
    metrics = _metrics(config, prepared, problems)
    runs = {name: run.config for name, run in prepared.items()}
    sources = dict.fromkeys(source for metric in metrics for source in metric.sources)
    problems += measurement_problems(runs, sources, has_tasks=any(metric.task for metric in metrics))
    if problems:
        raise ConfigError(str(path), problems)
    fingerprints = InputFingerprints()
    return Experiment(
        path=path,
        config=config,
        prepared=prepared,
        units=[unit for name, run in prepared.items() for unit in _units(config, name, run, fingerprints)],
        metrics=metrics,
        ranks={name: config.ranks or run.config.parallel.model_parallel_size for name, run in prepared.items()},
    )


def arm_data(base: Mapping[str, Any], changes: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Return the run.yaml of an arm, and one message per change that is not possible.

    A key with dots sets the value at its end as a whole, as `key=value` on the command line does. A section given as a
    mapping is merged into the section of the base: `schedule: {min_lr: 0}` keeps the other keys of `schedule`.
    """
    data, problems = copy.deepcopy(dict(base)), []
    for key, value in changes.items():
        if "." not in key and "[" not in key and isinstance(value, dict):
            _merge(data, key, value)
        elif (problem := set_value(data, key, copy.deepcopy(value))) is not None:
            problems.append(f"{key}: {problem}")
    return data, problems


def _merge(holder: dict[str, Any], key: str, value: Mapping[str, Any]) -> None:
    inner = holder.get(key)
    if key == "model" and isinstance(inner, str):  # the short form of {preset: NAME}
        inner = {"preset": inner}
    if not isinstance(inner, dict):
        holder[key] = copy.deepcopy(dict(value))
        return
    holder[key] = inner
    for name, one in value.items():
        if isinstance(one, dict):
            _merge(inner, name, one)
        else:
            inner[name] = copy.deepcopy(one)


def _prepare_arms(
    path: Path, config: ExperimentConfig, base: Mapping[str, Any], need_files: bool
) -> dict[str, PreparedRun]:
    found: dict[str, PreparedRun] = {}
    problems: dict[str, list[str]] = {}
    damaged: dict[str, list[str]] = {}
    if config.trunk is not None:  # before the changes of an arm, so that only its own init.from replaces the trunk
        base = {**base, "init": {**_section(base, "init"), "from": _trunk(config.trunk)}}
    for name, changes in config.arms.items():
        data, wrong = arm_data(base, changes)
        data |= {"name": f"{config.name}/{name}", "output": str(_folder(config, name, config.seeds[0]))}
        data |= {"seed": config.seeds[0]}
        data.pop("stop_at_step", None)
        if isinstance(data.get("checkpoint", {}), dict):
            data["checkpoint"] = {**_section(data, "checkpoint"), "keep": 1, "keep_every": None, "at_end": True}
        for text in wrong:
            problems.setdefault(text, []).append(name)
        try:
            found[name] = prepare_mapping(name, data, need_files=need_files, num_gpus=config.ranks)
        except ConfigError as error:
            for text in error.problems:
                problems.setdefault(text, []).append(name)
        except RefusedError as error:
            damaged.setdefault(str(error), []).append(name)
    if problems:
        raise ConfigError(str(path), [f"{_of_arms(config, names)}: {text}" for text, names in problems.items()])
    if damaged:
        raise RefusedError("\n".join(f"{_of_arms(config, names)}: {text}" for text, names in damaged.items()))
    return found


def _of_arms(config: ExperimentConfig, names: Sequence[str]) -> str:
    if len(names) == len(config.arms) > 1:
        return "all arms"
    return f"arm{'s' if len(names) > 1 else ''} {', '.join(names)}"


def _section(data: Mapping[str, Any], key: str) -> dict[str, Any]:
    section = data.get(key)
    return dict(section) if isinstance(section, dict) else {}


def _trunk(trunk: str) -> str:
    """Return the checkpoint of the trunk: a run directory would mean another one once its run continues."""
    return str(resolve_checkpoint(trunk)) if Path(trunk).exists() else trunk


def _folder(config: ExperimentConfig, arm: str, seed: int) -> Path:
    return Path(config.output) / arm / f"seed-{seed}"


def _units(config: ExperimentConfig, arm: str, run: PreparedRun, fingerprints: InputFingerprints) -> Iterator[Unit]:
    for seed in config.seeds:
        folder = _folder(config, arm, seed)
        own = run.config.model_copy(update={"seed": seed, "output": str(folder)})
        if not folder.exists() and (equal := find_equal_run(own, config.reuse, fingerprints)) is not None:
            own, folder = equal, Path(equal.output)
        yield Unit(arm, seed, folder, own, run.plan, {name: run.source_tokens[name] for name in run.prefixes})


def _token_problems(config: ExperimentConfig, prepared: Mapping[str, PreparedRun]) -> Iterator[str]:
    tokens = {name: run.config.tokens for name, run in prepared.items()}
    if config.equal_tokens and len(set(tokens.values())) > 1:
        listed = ", ".join(f"{name} {format_count(count)}" for name, count in tokens.items())
        yield (
            f"tokens: the arms differ in their tokens ({listed}), so their losses are not comparable; give all arms "
            "the same `tokens`, or set equal_tokens: false"
        )


def _metrics(config: ExperimentConfig, prepared: Mapping[str, PreparedRun], problems: list[str]) -> list[Metric]:
    """Return the metrics of an experiment; add one message per metric that an arm does not measure."""
    held_out = [list(run.config.validation.sources) if run.config.validation else [] for run in prepared.values()]
    known = [name for name in held_out[0] if all(name in sources for sources in held_out)]
    if MEAN in known:
        problems.append("validation.sources.mean: this name is the mean over all held-out sources; rename the source")
    for name, sources in config.means.items():
        problems += [f"means.{name}: {_unknown(source, known)}" for source in sources if source not in known]
        if any(name in own for own in held_out):
            problems.append(f"means.{name}: a held-out source has this name; choose another one")
    names = config.metrics
    if names is None:
        names = [*([MEAN] if len(known) > 1 else []), *config.means, *known]
    metrics = []
    for name in names:
        if name in known or name in config.means:
            metrics.append(Metric(name, tuple(config.means.get(name, [name]))))
        elif name == MEAN and known:
            metrics.append(Metric(name, tuple(known)))
        elif ":" in name and _measures_at_end(prepared):
            task, _, metric = name.partition(":")
            metrics.append(Metric(name, task=(task, metric)))
        else:
            problems.append(f"metrics: {_unknown(name, [MEAN, *config.means, *known])}")
    if not metrics and not problems:
        problems.append("validation: missing in the base; add held-out sources, whose losses the experiment compares")
    return metrics


def _measures_at_end(prepared: Mapping[str, PreparedRun]) -> bool:
    sections = [run.config.evaluation for run in prepared.values()]
    return all(section is not None and "end" in section.at for section in sections)


def _unknown(name: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(known) or 'none'}"
    if ":" in name:
        hint = "a task needs a section `evaluation` with `end` in its `at` in every arm"
    return f"{name!r} is not measured in every arm; {hint}"
