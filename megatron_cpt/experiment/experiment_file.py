"""Keys of EXPERIMENT.yaml: frozen, strict models, and reading of the file."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from megatron_cpt.config import read_mapping
from megatron_cpt.config.data_sections import ExpandPaths
from megatron_cpt.config.quantities import Section
from megatron_cpt.config.validate import validate_file

MEAN = "mean"
RESERVED_KEYS = ("name", "output", "seed", "stop_at_step")
"""Keys of run.yaml that the experiment sets itself; `stop_at_step` would end a run before its tokens."""

RESULT_NAMES = ("report.html", "summary.json", "summary.md", "experiment.sbatch", "logs")
"""Names in the folder of an experiment that no arm may have."""

_ARM_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")

Seed = Annotated[int, Field(strict=True, ge=0, lt=2**62)]


class SlurmConfig(Section):
    """Resources of one run as a SLURM job."""

    nodes: int = Field(1, gt=0)
    """Nodes per run."""
    gpus_per_node: int | None = Field(None, gt=0)
    """GPUs to request per node; null requests none."""
    time: str = Field("04:00:00", pattern=r"^[0-9:-]+$")
    """Time limit per run; a run that reaches it saves, and its job is requeued."""
    options: list[Annotated[str, Field(pattern=r"^--?[A-Za-z][^\n]*$")]] = Field(default_factory=list)
    """Further options of sbatch, such as "--partition=long"."""
    setup: list[Annotated[str, Field(pattern=r"^[^\n]*$")]] = Field(default_factory=list)
    """Shell lines before the run, such as "module load cuda"."""


class ExperimentConfig(Section):
    """A complete EXPERIMENT.yaml."""

    name: str = Field(min_length=1)
    """Name of the experiment in tables and reports."""
    output: Annotated[str, ExpandPaths] = Field(min_length=1)
    """Folder of the experiment; the runs are OUTPUT/ARM/seed-S."""
    base: Annotated[str, ExpandPaths] = Field(min_length=1)
    """run.yaml that every arm changes, relative to the folder of this file."""
    trunk: Annotated[str | None, ExpandPaths] = None
    """Checkpoint, or run directory for its newest one, that every run starts from; null keeps `init` of the base."""
    seeds: list[Seed] = Field(min_length=1)
    """Seeds; each arm is trained once per seed."""
    arms: dict[str, dict[str, Any]] = Field(min_length=1)
    """Per arm the keys of run.yaml that it changes; {} changes nothing."""
    baseline: str | None = None
    """Arm that the others are compared with; null takes the first one."""
    equal_tokens: bool = True
    """Require that all arms train on equally many tokens."""
    reuse: list[Annotated[str, ExpandPaths]] = Field(default_factory=list)
    """Outputs of other experiments; a finished run there that differs in name and output only is not trained again."""
    metrics: list[Annotated[str, Field(min_length=1)]] | None = Field(None, min_length=1)
    """Held-out sources, names of `means`, `mean` and TASK:METRIC; the first one ranks the arms. Null takes the mean
    over all held-out sources, all `means` and every source."""
    means: dict[str, Annotated[list[str], Field(min_length=1)]] = Field(default_factory=dict)
    """Means over held-out sources, per name."""
    unit: Literal["nats_per_token", "bits_per_byte"] = "nats_per_token"
    """Unit of held-out losses; `bits_per_byte` decodes the held-out data with the run's tokenizer and counts bytes."""
    confidence: float = Field(0.95, gt=0.5, lt=1)
    """Level of the confidence intervals; a difference counts if its corrected p-value is below 1 minus this level."""
    ranks: int | None = Field(None, gt=0)
    """Processes per run; null takes the smallest number that holds the model (`parallel`)."""
    keep_checkpoints: Literal["last", "none"] = "last"
    """Checkpoints kept per finished run: the last one, or none once its result is safe."""
    slurm: SlurmConfig = Field(default_factory=SlurmConfig)
    """Resources for `--engine slurm`."""

    @model_validator(mode="after")
    def _consistent(self) -> ExperimentConfig:
        problems = [*self._problems()]
        if problems:
            raise ValueError("; ".join(problems))
        return self

    def _problems(self) -> list[str]:
        problems = [
            f"arms: {name!r}: an arm is also a folder; use letters, digits, dots, - and _"
            for name in self.arms
            if not _ARM_NAME.fullmatch(name)
        ]
        problems += [
            f"arms: {name!r}: the experiment writes a file or folder of this name into its output; choose another name"
            for name in self.arms
            if name.casefold() in RESULT_NAMES
        ]
        problems += [
            f"arms.{name}.{key}: the experiment sets it; remove it"
            for name, changes in self.arms.items()
            for key in changes
            if key.partition(".")[0] in RESERVED_KEYS
        ]
        if self.baseline is not None and self.baseline not in self.arms:
            problems.append(f"baseline: {self.baseline!r} is no arm; choose one of {', '.join(self.arms)}")
        if len(set(self.seeds)) < len(self.seeds):
            problems.append(f"seeds: {self.seeds}: a seed is given twice; every run needs a seed of its own")
        for key, names in {
            "metrics": self.metrics or [],
            **{f"means.{n}": one for n, one in self.means.items()},
        }.items():
            if repeated := [name for name in dict.fromkeys(names) if names.count(name) > 1]:
                problems.append(f"{key}: {', '.join(repeated)}: given twice; remove one")
        if MEAN in self.means:
            problems.append("means.mean: this name is the mean over all held-out sources; choose another one")
        return problems


def read_experiment(path: Path) -> ExperimentConfig:
    """Read and validate an EXPERIMENT.yaml.

    Raises:
        UserError: it cannot be read.
        ConfigError: with all problems.
    """
    return validate_file(ExperimentConfig, read_mapping(path), str(path))
