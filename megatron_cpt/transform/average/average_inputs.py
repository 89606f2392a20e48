"""Inputs of an average: which checkpoints, opened in any format, and what is equal and different about them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import orjson

from megatron_cpt.checkpoint import layout
from megatron_cpt.checkpoint.manifest import Verify
from megatron_cpt.checkpoint.preflight import model_shape
from megatron_cpt.checkpoint.record import read_run, read_state
from megatron_cpt.convert.side_files import tokenizer_among
from megatron_cpt.convert.source import SourceCheckpoint, open_source_checkpoint, resolve_source
from megatron_cpt.data.tokenizers.tokenizer import read_fingerprint
from megatron_cpt.errors import RefusedError, UserError
from megatron_cpt.files.checksum import ALGORITHM, Checksum, file_checksum
from megatron_cpt.files.output_path import refuse_output_inside

# Fields of the model section that training uses and the weights' meaning does not depend on.
_TRAINING_FIELDS = ("attention_dropout", "hidden_dropout")
_KEPT_KEYS = ("tokenizer", "seq_length", "documents", "precision")


@dataclass(frozen=True)
class AverageInput:
    """Opened checkpoint that takes part in an average.

    Attributes:
        path: its folder; for a run directory, its newest checkpoint.
        run, state: run.yaml and state.json; empty for checkpoints of other projects.
    """

    path: Path
    opened: SourceCheckpoint
    run: Mapping[str, Any] = field(default_factory=dict)
    state: Mapping[str, Any] = field(default_factory=dict)

    @property
    def step(self) -> int | None:
        """Step of the run that saved it; None: no run of this package did."""
        return (self.state.get("train") or {}).get("step") or None

    def kept_settings(self) -> dict[str, Any]:
        """Return the entries of run.yaml that a model is used with, such as its tokenizer."""
        return {key: self.run[key] for key in _KEPT_KEYS if key in self.run}

    def tokenizer_fingerprint(self) -> str | None:
        """Return the hash of the tokenizer's content; None: unknown."""
        found = self.state.get("tokenizer_fingerprint")
        if found is not None:
            return str(found)
        spec = tokenizer_among(self.opened.side_files)
        return read_fingerprint(spec) if spec is not None else None

    def digest(self) -> str:
        """Return a checksum that covers every file with weights: of the manifest, or of the files where none exists.

        Raises:
            OSError: a file cannot be read.
        """
        manifest = self.path / layout.MANIFEST_FILE
        if layout.is_checkpoint(self.path) and manifest.is_file():
            return f"{ALGORITHM} of manifest.json: {file_checksum(manifest)}"
        files = [[file.name, file.stat().st_size, file_checksum(file)] for file in self.opened.sources]
        return f"{ALGORITHM} of files: {Checksum(orjson.dumps(files)).hexdigest()}"


def last_checkpoints(run_directory: Path, count: int) -> list[Path]:
    """Return the newest checkpoints of a run, oldest first.

    Raises:
        UserError: the run does not exist, or has fewer checkpoints.
        RefusedError: the folder is not a run with checkpoints.
    """
    if not run_directory.is_dir():
        raise UserError(f"--run {run_directory}: no such run directory")
    folder = layout.checkpoints_folder(run_directory)
    found = [path for path in layout.list_checkpoints(folder) if layout.has_own_name(path)]
    if not found:
        raise RefusedError(f"--run {run_directory}: holds no checkpoint (no checkpoints/step-*); give a run with some")
    if len(found) < count:
        names = ", ".join(path.name for path in found)
        raise UserError(
            f"--last {count}: {run_directory} has {len(found)}: {names}; give a smaller number (a run keeps as many as "
            "checkpoint.keep and checkpoint.keep_every say)"
        )
    return found[-count:]


def open_inputs(
    paths: Sequence[Path], output: Path, *, named_model: str | None = None, verify: Verify = "full"
) -> list[AverageInput]:
    """Open the checkpoints of an average.

    Args:
        output: the checkpoint to create.
        named_model: a preset or a YAML file with a model section, for checkpoints without a usable config.
        verify: share of the checksums of our checkpoints to compare, each before its file is read.

    Raises:
        UserError: there are fewer than two checkpoints, one does not exist, one is named twice, or the output is
            inside one of them.
        RefusedError: one is corrupt, or they are not of the same model and tokenizer.
    """
    if len(paths) < 2:
        raise UserError("give at least two checkpoints to average, or a run: --run RUN_DIR --last N")
    folders = [resolve_source(path) for path in paths]
    real = [folder.resolve() for folder in folders]
    for number, folder in enumerate(real):
        if folder in real[:number]:
            raise UserError(f"{folders[number]}: named twice; name it once and give it a larger weight: --weights")
        refuse_output_inside(output, folders[number])
    inputs = [_open(folder, named_model, verify) for folder in folders]
    for other in inputs[1:]:
        _refuse_other_model(inputs[0], other)
        _refuse_other_tokenizer(inputs[0], other)
    return inputs


def _open(path: Path, named_model: str | None, verify: Verify) -> AverageInput:
    opened = open_source_checkpoint(path, named_model=named_model, verify=verify)
    if layout.is_checkpoint(path) and (path / layout.RUN_FILE).is_file():
        return AverageInput(path, opened, read_run(path), read_state(path))
    return AverageInput(path, opened)


def _shape(source: AverageInput) -> dict[str, Any]:
    return model_shape({"model": source.opened.model.model_dump(mode="json")})


def _refuse_other_model(first: AverageInput, other: AverageInput) -> None:
    ours, theirs = _shape(first), _shape(other)
    problems = [
        f"model.{key}: {ours[key]} and {theirs[key]}"
        for key in ours
        if key not in _TRAINING_FIELDS and ours[key] != theirs[key]
    ]
    if problems:
        lines = [f"{first.path} and {other.path} are different models:", *(f"  - {problem}" for problem in problems)]
        raise RefusedError("\n".join([*lines, "average checkpoints of one model"]))


def _refuse_other_tokenizer(first: AverageInput, other: AverageInput) -> None:
    ours, theirs = first.tokenizer_fingerprint(), other.tokenizer_fingerprint()
    if ours is not None and theirs is not None and ours != theirs:
        raise RefusedError(
            f"{first.path} and {other.path} have different tokenizers (SHA-256 {ours[:16]} and {theirs[:16]}), so "
            "their embeddings mean other text; average checkpoints of one tokenizer"
        )


def describe_differences(inputs: Sequence[AverageInput]) -> list[str]:
    """Return one line per difference that does not forbid an average."""
    notes = []
    if unknown := [str(each.path) for each in inputs if each.tokenizer_fingerprint() is None]:
        notes.append(f"the tokenizer is unknown, so it was not compared: {', '.join(unknown)}")
    models = [each.opened.model for each in inputs]
    for name in (*_TRAINING_FIELDS, "max_positions"):
        notes += _difference(f"model.{name}", inputs, [getattr(model, name) for model in models])
    for name in _KEPT_KEYS[1:]:
        notes += _difference(name, inputs, [each.run.get(name) for each in inputs])
    dtypes = [
        sorted({str(spec.dtype).removeprefix("torch.") for spec in each.opened.specs.values()}) for each in inputs
    ]
    notes += _difference("dtype", inputs, [", ".join(names) for names in dtypes], effect="the wider one is stored")
    if len({each.state.get("run_id") for each in inputs}) > 1:
        notes.append("the checkpoints are of different runs")
    return notes


def _difference(name: str, inputs: Sequence[AverageInput], values: Sequence[Any], effect: str = "") -> list[str]:
    """Return a note that names the first input with another value than the first one has."""
    for each, value in zip(inputs, values, strict=True):
        if value != values[0]:
            kept = effect or f"the result has {values[0]}"
            return [f"{name} differs: {values[0]} in {inputs[0].path}, {value} in {each.path}; {kept}"]
    return []
