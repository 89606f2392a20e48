"""Anything -> a checkpoint of ours: streamed, checked, resumable, published by one rename."""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import tempfile
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import orjson
import torch

from megatron_cpt import __version__
from megatron_cpt.checkpoint import layout
from megatron_cpt.checkpoint.manifest import FileDigest, digest, manifest_text
from megatron_cpt.config import dump_yaml
from megatron_cpt.convert.job import (
    DTYPES,
    Advance,
    cast,
    check_finite,
    check_space,
    check_target,
    os_errors_as_cpt_errors,
    publish,
    reserved,
    run_parallel,
    silent,
    sync_file,
)
from megatron_cpt.convert.journal import Journal
from megatron_cpt.convert.megatron.torch_dist_plan import FilePlan, Form, Target, file_bytes, plan_files, total_bytes
from megatron_cpt.convert.megatron.torch_dist_writer import (
    WrittenFile,
    write_extra_states,
    write_file,
    write_metadata,
    written_from_journal,
)
from megatron_cpt.convert.source import HF_FOLDER, SourceCheckpoint, open_source_checkpoint
from megatron_cpt.convert.vocabulary import VocabularyReport, extend_vocabulary
from megatron_cpt.files.atomic import sync_folder, write_atomically

_EXTRA_STATE_FILE = "__extra_0.distcp"
_SPARE_BYTES = 64 << 20  # for what is written beside the tensors


@dataclass(frozen=True, kw_only=True)
class ImportOptions:
    """How to import.

    Attributes:
        dtype: `fp32`, `bf16` or `fp16`; None: as it is.
        target: the layout that the pieces are cut for.
        workers: threads; each holds a piece of a tensor in memory, or a row-parallel matrix.
        model: a preset or file that says what a checkpoint of Megatron is.
        allow_pickle: read `.bin` weights of a Hugging Face folder.
        allow_nan: take weights that are not finite.
        new_tokens: to be added to the vocabulary.
        init_rows: where their rows come from: `pieces` of the old tokenizer, or the `mean` of all rows.
    """

    dtype: str | None = None
    target: Target = field(default_factory=Target)
    workers: int = 0
    model: str | None = None
    allow_pickle: bool = False
    allow_nan: bool = False
    new_tokens: tuple[str, ...] = ()
    init_rows: str = "pieces"

    @property
    def num_workers(self) -> int:
        """Threads, resolved."""
        return self.workers or os.cpu_count() or 1


@dataclass(frozen=True)
class ImportReport:
    """What was imported.

    Attributes:
        kind, family: of the source.
        num_tensors, num_parameters, num_bytes: of the model as it was written, padding included.
        num_files: of tensors.
        num_kept: files of an earlier call that were kept.
        seconds: it took.
        vocabulary: what became of it, where tokens were added.
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

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


def import_checkpoint(
    source: Path, target: Path, options: ImportOptions | None = None, *, advance: Advance = silent
) -> ImportReport:
    """Import a Hugging Face folder or a checkpoint of Megatron.

    A call that was killed is gone on with by the same call. Nothing appears under the target's name before all of it is
    there and on the disk.

    Raises:
        UserError: the source is not there, the target is, or the disk is too small.
        RefusedError: the source is damaged, hostile, or a model that cannot be trained here.
        CptError: the system fails in the middle: a full disk, a limit, a file that is gone.
    """
    options = options or ImportOptions()
    check_target(target)
    with os_errors_as_cpt_errors(_aside(target)), tempfile.TemporaryDirectory() as scratch:
        incoming = open_source_checkpoint(source, named_model=options.model, allow_pickle=options.allow_pickle)
        vocabulary = None
        if options.new_tokens:
            incoming, vocabulary = extend_vocabulary(incoming, options.new_tokens, options.init_rows, Path(scratch))
        return _import(source, target, options, advance, incoming, vocabulary)


def _import(
    source: Path,
    target: Path,
    options: ImportOptions,
    advance: Advance,
    incoming: SourceCheckpoint,
    vocabulary: VocabularyReport | None,
) -> ImportReport:
    started = time.perf_counter()
    forms = _final_forms(incoming, options.dtype)
    files = plan_files(forms, incoming.model.layers, options.target)
    aside = _aside(target)
    with reserved(target, aside):
        check_space(target.parent, total_bytes(forms) + _SPARE_BYTES, aside)
        journal = Journal(aside, _job(incoming, options))
        written = _written_before(journal)
        num_kept = len(written)
        _write_tensors(incoming, forms, files, options, journal, written, advance)
        _finish(aside, _state(source, incoming, vocabulary), incoming, forms, written, journal)
        publish(aside, target)
    return ImportReport(
        incoming.kind,
        incoming.family,
        len(forms),
        sum(form.num_bytes // form.dtype.itemsize for form in forms.values()),
        total_bytes(forms),
        len(files),
        num_kept,
        time.perf_counter() - started,
        vocabulary,
    )


def _final_forms(incoming: SourceCheckpoint, dtype: str | None) -> dict[str, Form]:
    return {
        name: Form(form.shape, DTYPES[dtype] if dtype is not None else form.dtype)
        for name, form in incoming.forms.items()
    }


def _job(incoming: SourceCheckpoint, options: ImportOptions) -> dict[str, Any]:
    return {
        "software": __version__,
        "sources": incoming.identity(),
        "model": incoming.model.model_dump(mode="json"),
        "dtype": options.dtype,
        "target": asdict(options.target),
        "allow_nan": options.allow_nan,
        "new_tokens": [*options.new_tokens, options.init_rows],
    }


def _aside(target: Path) -> Path:
    return target.parent / f".{target.name}.tmp"


def _written_before(journal: Journal) -> dict[str, WrittenFile]:
    """The files that an earlier call has finished, and that are still there."""
    written = {line["file"]: written_from_journal(line) for line in journal.lines}
    return {
        name: file
        for name, file in written.items()
        if (path := journal.folder / name).is_file() and path.stat().st_size == file.size
    }


def _write_tensors(
    incoming: SourceCheckpoint,
    forms: Mapping[str, Form],
    files: list[FilePlan],
    options: ImportOptions,
    journal: Journal,
    written: dict[str, WrittenFile],
    advance: Advance,
) -> None:
    """All files that are not yet there, in parallel; `written` gains a record a file."""
    total = total_bytes(forms)
    advance(sum(file_bytes(plan, forms) for plan in files if plan.name in written), total)

    def read(name: str, first: int, last: int) -> torch.Tensor:
        origin, rows = incoming.origin(name), incoming.read(name, first, last)
        if not options.allow_nan:
            check_finite(origin, rows)
        return cast(origin, rows, forms[name].dtype)

    def work(plan: FilePlan) -> None:
        result = write_file(
            journal.folder / plan.name,
            plan,
            forms,
            num_layers=incoming.model.layers,
            tensor_parallel=options.target.tensor,
            read=read,
            advance=lambda count: advance(count, total),
        )
        journal.record({"file": plan.name, **asdict(result)})
        written[plan.name] = result

    left = [plan for plan in files if plan.name not in written]
    left.sort(key=lambda plan: file_bytes(plan, forms), reverse=True)  # an embedding begun last would be waited for
    run_parallel(work, left, options.num_workers)
    if _EXTRA_STATE_FILE not in written:
        result = write_extra_states(journal.folder / _EXTRA_STATE_FILE, incoming.model.layers)
        journal.record({"file": _EXTRA_STATE_FILE, **asdict(result)})
        written[_EXTRA_STATE_FILE] = result


def _finish(
    aside: Path,
    state: Mapping[str, Any],
    incoming: SourceCheckpoint,
    forms: Mapping[str, Form],
    written: Mapping[str, WrittenFile],
    journal: Journal,
) -> None:
    """Everything beside the tensors; the manifest last."""
    names = write_metadata(aside, forms, incoming.model.layers, written)
    (aside / layout.STATE_FILE).write_bytes(orjson.dumps(state, option=orjson.OPT_INDENT_2))
    run = {"name": aside.name.removeprefix(".").removesuffix(".tmp"), "model": incoming.model.model_dump(mode="json")}
    (aside / layout.RUN_FILE).write_text(dump_yaml(run), encoding="utf-8")
    names += [layout.STATE_FILE, layout.RUN_FILE]
    shutil.rmtree(aside / HF_FOLDER, ignore_errors=True)  # of an earlier call that came as far as here
    for name, file in incoming.side_files.items():
        (aside / HF_FOLDER).mkdir(exist_ok=True)
        shutil.copyfile(file, aside / HF_FOLDER / name)
        names.append(f"{HF_FOLDER}/{name}")
    for name in names:
        sync_file(aside / name)
    if incoming.side_files:
        sync_folder(aside / HF_FOLDER)
    digests = {name: FileDigest(result.size, result.checksum) for name, result in written.items()}
    digests |= {name: digest(aside / name) for name in names}
    write_atomically(aside / layout.MANIFEST_FILE, manifest_text(digests))
    journal.remove()


def _state(source: Path, incoming: SourceCheckpoint, vocabulary: VocabularyReport | None) -> dict[str, Any]:
    """state.json of a checkpoint that no run has written: nothing is trained, nothing is read."""
    return {
        "format_version": layout.FORMAT_VERSION,
        "content": "weights",
        "train": {"step": 0, "tokens": 0, "samples_by_source": {}, "data": None},
        "layout": {"world_size": 1, "tensor": 1, "pipeline": 1, "virtual_pipeline": 1, "context": 1},
        "data_fingerprints": {},
        "layer_spec": "local",
        "imported": {
            "from": str(source.resolve()),
            "kind": incoming.kind,
            "family": incoming.family,
            "vocabulary": asdict(vocabulary) if vocabulary is not None else None,
        },
        "versions": {
            "megatron_cpt": __version__,
            **{name: importlib.metadata.version(name) for name in ("torch", "megatron-core", "numpy")},
        },
    }
