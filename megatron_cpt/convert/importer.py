"""Import of a Hugging Face folder or a Megatron checkpoint: streamed, checked, resumable, published by one rename."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from megatron_cpt import __version__
from megatron_cpt.convert.checkpoint_files import write_checkpoint_files
from megatron_cpt.convert.dtypes import cast, check_finite, find_dtype
from megatron_cpt.convert.job import Advance, JobFolder, no_progress, refuse_existing, run_parallel
from megatron_cpt.convert.mapping.names import is_optimizer_tensor
from megatron_cpt.convert.megatron.torch_dist_plan import FilePlan, Target, TensorSpec, plan_files
from megatron_cpt.convert.megatron.torch_dist_writer import (
    FileEntry,
    WrittenFile,
    extra_state_keys,
    write_extra_states,
    write_file,
)
from megatron_cpt.convert.source import SourceCheckpoint, open_source_checkpoint, resolve_source
from megatron_cpt.convert.vocabulary import VocabularyReport, count_ids_without_row, extend_vocabulary
from megatron_cpt.convert.vocabulary_loss import VocabularyLoss, encode_text, measure_loss
from megatron_cpt.errors import UserError
from megatron_cpt.files.identity import must_not_change
from megatron_cpt.files.output_path import refuse_output_inside
from megatron_cpt.files.system_errors import os_errors_as_cpt_errors

_EXTRA_STATE_FILE = "__extra_0.distcp"
_SPARE_BYTES = 64 << 20  # for the files besides the tensors


@dataclass(frozen=True, kw_only=True)
class ImportOptions:
    """Options of an import; the defaults suit most models.

    Attributes:
        dtype: `fp32`, `bf16` or `fp16`; None: keep the dtype of each tensor.
        target: tensor- and pipeline-parallel sizes that load fastest; every layout can load the checkpoint.
        workers: number of threads; 0: one per core. Each holds up to 16 MiB of a tensor in memory.
        model: a preset, or a YAML file with a model section, for Megatron checkpoints without a usable config.
        allow_pickle: also read pickled `.bin` weights of a Hugging Face folder; tensors only, no code is run.
        allow_nan: import weights that are NaN or infinite.
        optimizer: also import Adam's moments, master weights and step, for `init.load: weights+optimizer`.
        new_tokens: tokens to add to tokenizer and model.
        init_rows: initial rows of new tokens in embedding and output layer: `pieces` (mean over the old tokenizer's
            pieces of the token) or `mean` (mean over all tokens).
        loss_on: held-out text, to compute the loss before and after the new tokens; see `encode_text`. The model must
            fit into memory in fp32.
    """

    dtype: str | None = None
    target: Target = field(default_factory=Target)
    workers: int = 0
    model: str | None = None
    allow_pickle: bool = False
    allow_nan: bool = False
    optimizer: bool = False
    new_tokens: tuple[str, ...] = ()
    init_rows: str = "pieces"
    loss_on: str | None = None


@dataclass(frozen=True)
class ImportReport:
    """Result of an import.

    Attributes:
        kind: format of the source: `huggingface`, `torch_dist` or `legacy`.
        family: family of the model, if known.
        num_tensors, num_bytes: size of the checkpoint as written, padding and optimizer included.
        num_parameters: size of the model, padding included.
        num_files: number of files with tensors.
        num_kept: number of these files that an interrupted earlier call had written.
        vocabulary: changes to the vocabulary, if tokens were added.
        ids_without_row: ids of the tokenizer for which the model has no row of the embedding.
        optimizer_step: Adam's step, if the optimizer was imported.
        loss: loss on `ImportOptions.loss_on` under both vocabularies.
    """

    kind: str
    family: str | None
    num_tensors: int
    num_parameters: int
    num_bytes: int
    num_files: int
    num_kept: int
    seconds: float
    vocabulary: VocabularyReport | None = None
    ids_without_row: int = 0
    optimizer_step: int | None = None
    loss: VocabularyLoss | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain values."""
        return asdict(self)


def import_checkpoint(
    source: str | Path, target: str | Path, options: ImportOptions | None = None, *, advance: Advance = no_progress
) -> ImportReport:
    """Import a Hugging Face folder or a Megatron checkpoint as a checkpoint that training can start from.

    The target appears only when it is complete and on the disk. Call the function again with the same arguments to
    resume an interrupted import. Example:

        import_checkpoint("hf/nemotron", "ckpt/base", ImportOptions(dtype="bf16"))

    Args:
        target: the checkpoint to create; it must not exist.
        advance: progress callback, see `Advance`.

    Raises:
        UserError: the source does not exist, the target exists or is inside it, or the disk is too small.
        RefusedError: the source is corrupt or unsafe, changes while it is read, or is a model that cannot be trained
            here.
        CptError: the operating system failed, for example with a full disk.
    """
    source, target, options = Path(source), Path(target), options or ImportOptions()
    if options.optimizer and options.new_tokens:
        raise UserError("--optimizer: new tokens have no moments; import with --add-tokens or with --optimizer")
    if options.loss_on and not options.new_tokens:
        raise UserError("--loss-on: compares the loss before and after new tokens; give them with --add-tokens")
    refuse_existing(target)
    with os_errors_as_cpt_errors(work_folder(target)), tempfile.TemporaryDirectory() as scratch:
        refuse_output_inside(target, resolve_source(source))
        opened = open_source_checkpoint(
            source,
            named_model=options.model,
            allow_pickle=options.allow_pickle,
            with_optimizer=options.optimizer,
        )
        extended = text = None
        if options.new_tokens:
            extended = extend_vocabulary(opened, options.new_tokens, options.init_rows, Path(scratch))
            opened = extended.source
            text = encode_text(options.loss_on, extended) if options.loss_on else None
        vocabulary = extended.report if extended else None
        started = time.perf_counter()
        dtype = find_dtype(options.dtype)
        specs = {
            name: spec if is_optimizer_tensor(name) else TensorSpec(spec.shape, dtype or spec.dtype)
            for name, spec in opened.specs.items()
        }

        def write_files(folder: Path, written: Mapping[str, WrittenFile]) -> None:
            write_checkpoint_files(folder, target.name, source, opened, specs, written, vocabulary)

        sizes = write_checkpoint(opened, specs, target, _job(opened, options), options, write_files, advance)
        ids_without_row = count_ids_without_row(opened)
        seconds = time.perf_counter() - started
        loss = measure_loss(target, text, extended) if extended and text else None
    return ImportReport(
        kind=opened.kind,
        family=opened.family,
        num_tensors=len(specs),
        num_parameters=sum(
            spec.num_bytes // spec.dtype.itemsize for name, spec in specs.items() if not is_optimizer_tensor(name)
        ),
        num_bytes=sizes.num_bytes,
        num_files=sizes.num_files,
        num_kept=sizes.num_kept,
        seconds=seconds,
        vocabulary=vocabulary,
        ids_without_row=ids_without_row,
        optimizer_step=opened.groups[0]["step"] if opened.groups is not None else None,
        loss=loss,
    )


def _job(source: SourceCheckpoint, options: ImportOptions) -> dict[str, Any]:
    return {
        "software": __version__,
        "sources": source.identity(),
        "model": source.model.model_dump(mode="json"),
        "dtype": options.dtype,
        "target": asdict(options.target),
        "allow_nan": options.allow_nan,
        "optimizer": options.optimizer,
        "new_tokens": [*options.new_tokens, options.init_rows],
    }


@dataclass(frozen=True)
class CheckpointSizes:
    """Sizes of a written checkpoint.

    Attributes:
        num_bytes: of its tensors.
        num_kept: number of files that an interrupted earlier call had written.
    """

    num_bytes: int
    num_files: int
    num_kept: int


def work_folder(target: Path) -> Path:
    """Return the folder in which a checkpoint is written before it gets its name."""
    return target.with_name(f".{target.name}.tmp")


def write_checkpoint(
    source: SourceCheckpoint,
    specs: Mapping[str, TensorSpec],
    target: Path,
    job: Mapping[str, Any],
    options: ImportOptions,
    write_files: Callable[[Path, Mapping[str, WrittenFile]], None],
    advance: Advance,
) -> CheckpointSizes:
    """Write the tensors of a source as a checkpoint and publish it; resume an interrupted call of the same job.

    Args:
        specs: shapes and dtypes to write; `source.read` may return another dtype.
        job: what decides the bytes of the result.
        options: its `target`, `workers` and `allow_nan` matter.
        write_files: writes the other files into the work folder, the manifest last.

    Raises:
        UserError: the disk is too small.
        RefusedError: the source changes while it is read, or has NaN.
    """
    num_bytes = sum(spec.num_bytes for spec in specs.values())
    plans = plan_files(specs, source.model.layers, options.target)
    with JobFolder(work_folder(target), target, job, needed_bytes=num_bytes + _SPARE_BYTES) as work:
        written = _files_written_before(work)
        num_kept = len(written)
        with must_not_change(source.identities):
            _write_tensors(source, specs, plans, options, work, written, advance)
            write_files(work.path, written)
        work.publish()
    return CheckpointSizes(num_bytes, len(plans), num_kept)


def _files_written_before(work: JobFolder) -> dict[str, WrittenFile]:
    """Return the files that an interrupted call has finished and that are as it wrote them."""
    return {
        name: WrittenFile(line["size"], line["checksum"], [FileEntry(**entry) for entry in line["entries"]])
        for name, line in work.journal.verified_parts(work.path).items()
    }


def _write_tensors(
    source: SourceCheckpoint,
    specs: Mapping[str, TensorSpec],
    plans: list[FilePlan],
    options: ImportOptions,
    work: JobFolder,
    written: dict[str, WrittenFile],
    advance: Advance,
) -> None:
    """Write the files that are not in `written`, in parallel, and add them to it.

    Args:
        specs: shapes and dtypes to write; `source.read` may return another dtype.
        options: its `target`, `workers` and `allow_nan` matter.
    """
    total = sum(plan.num_bytes for plan in plans)
    advance(sum(plan.num_bytes for plan in plans if plan.name in written), total)

    def read(name: str, first: int, last: int) -> torch.Tensor:
        origin, rows = source.origins.get(name, name), source.read(name, first, last)
        if not options.allow_nan:
            check_finite(origin, rows)
        return cast(origin, rows, specs[name].dtype)

    def record(name: str, file: WrittenFile) -> None:
        work.journal.record({"file": name, **asdict(file)})
        written[name] = file

    def write(plan: FilePlan) -> None:
        file = work.path / plan.name
        record(plan.name, write_file(file, plan, specs, options.target.tensor, read, lambda n: advance(n, total)))

    missing = [plan for plan in plans if plan.name not in written]
    missing.sort(key=lambda plan: plan.num_bytes, reverse=True)  # a large file at the end would run alone
    run_parallel(write, missing, options.workers)
    if _EXTRA_STATE_FILE not in written:
        keys = extra_state_keys(source.model.layers)
        record(_EXTRA_STATE_FILE, write_extra_states(work.path / _EXTRA_STATE_FILE, keys))
