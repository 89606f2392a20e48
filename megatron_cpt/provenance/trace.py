"""Documents that a step has read: its samples are found by replaying the blend, and looked up in the files."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy.typing as npt

from megatron_cpt.data import IndexedDataset, TokenStream
from megatron_cpt.data.tokenfile.documents import document_bounds
from megatron_cpt.data.tokenfile.fingerprint import fingerprint, is_same_data
from megatron_cpt.errors import RefusedError, UserError
from megatron_cpt.provenance.plans_file import FILE_NAME as PLANS_FILE
from megatron_cpt.provenance.plans_file import PlanRecord, read_plan_records
from megatron_cpt.provenance.replay import Progress, Replay, find_replay, possible_starts
from megatron_cpt.provenance.run_history import Blends, Recorded, Witness, read_counts, read_history


@dataclass(frozen=True)
class DocumentPart:
    """Part of a document that is in a sample; offset in the `.bin` and length are in tokens.

    Attributes:
        prefix: path of the file that holds the document, without `.bin`.
    """

    document: int
    first_token: int
    num_tokens: int
    prefix: str


@dataclass(frozen=True)
class TracedSample:
    """Sample of a step.

    Attributes:
        sample: position in the global batch, from 0.
        source: name of the source.
        sample_index: index of the sample in the source, from 0, counted over all epochs.
        epoch: the source's epoch, from 0.
        prefix: path of the file without `.bin`, or of the document list.
        first_token: offset of the sample's first token in the `.bin`, or in the documents of the list, in tokens.
        num_tokens: seq_length + 1; the last token is only a label.
        documents: the parts of documents that make up the sample, in order.
    """

    sample: int
    source: str
    sample_index: int
    epoch: int
    prefix: str
    first_token: int
    num_tokens: int
    documents: tuple[DocumentPart, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values; `sample_index` is called "k" there."""
        return {"k" if name == "sample_index" else name: value for name, value in asdict(self).items()}


@dataclass(frozen=True)
class Trace:
    """Samples that a step has read.

    Attributes:
        step: number of the step, from 1.
        phase: name of the step's phase.
        replayed_from: the replay started after this step; 0: at the start of the run.
        plan: file and line of the plan that the step followed.
        confirmed_by: the record at or after the step that agrees with the replay; None: no such record exists yet, so
            these are the samples that the step will read.
        notes: warnings, such as a checkpoint that was skipped.
        run: the run.yaml as plain values.
        samples: in the order of the global batch.
    """

    step: int
    phase: str
    replayed_from: int
    plan: str
    confirmed_by: str | None
    notes: tuple[str, ...]
    run: Mapping[str, Any]
    samples: tuple[TracedSample, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values, without the run.yaml."""
        plain = {key: value for key, value in asdict(self).items() if key != "run"}
        return plain | {"samples": [sample.to_dict() for sample in self.samples]}


def trace_step(run_directory: str | Path, step: int, *, progress: Progress | None = None) -> Trace:
    """Find the samples and documents that a step of a run has read.

    Example:
        >>> [(sample.source, sample.prefix, sample.first_token) for sample in cpt.trace("runs/small", 17).samples]
        [('web', 'data/web', 40962), ('code', 'data/code', 8193), ...]

    Args:
        run_directory: a run directory; plans.jsonl is required, metrics.jsonl and checkpoints shorten the replay.
        step: number of the step, from 1.
        progress: called during the replay.

    Raises:
        UserError: the run or the step does not exist, or the data is not at the paths in run.yaml.
        RefusedError: the samples cannot be determined: plans.jsonl is missing, records contradict it, or data files
            were replaced.
    """
    folder = Path(run_directory)
    recorded, notes = read_history(folder)
    record = _record_of(step, read_plan_records(folder), folder)
    recorded = [checkpoint for checkpoint in recorded if record.has(checkpoint)]
    line, later_line = read_counts(folder, record.after_step, step)
    witness = _nearest(step, record, recorded, later_line)
    replay = find_replay(possible_starts(record, recorded, line, step), record.blends, step, witness, progress)
    if witness is None:
        notes.append(f"nothing is recorded of step {step} yet: it will read these samples under {record.blends.origin}")
    samples, about_files = _locate(replay, record, is_done=witness is not None)
    return Trace(
        step=step,
        phase=replay.phase,
        replayed_from=replay.start.step,
        plan=record.blends.origin,
        confirmed_by=witness.origin if witness is not None else None,
        notes=(*notes, *about_files),
        run=record.blends.run,
        samples=tuple(samples),
    )


def _record_of(step: int, records: Sequence[PlanRecord], folder: Path) -> PlanRecord:
    last_step = records[-1].blends.last_step
    if not 1 <= step <= last_step:
        raise UserError(f"--step {step}: the steps of {folder} are 1 to {last_step}")
    record = next((record for record in reversed(records) if record.after_step < step), None)
    if record is None:
        raise RefusedError(
            f"step {step}: its samples cannot be determined: {folder / PLANS_FILE} begins after step "
            f"{records[0].after_step}; only later steps can be traced"
        )
    return record


def _nearest(step: int, record: PlanRecord, recorded: Sequence[Recorded], line: Witness | None) -> Witness | None:
    """Return the first recorded state at or after a step, among those that belong to the same plan."""
    found = [checkpoint.witness for checkpoint in recorded if checkpoint.step >= step][:1]
    found += [record.end] if record.end is not None else []
    found += [line] if line is not None and (record.end is None or line.step <= record.end.step) else []
    return min(found, key=lambda witness: witness.step, default=None)


def _locate(replay: Replay, record: PlanRecord, *, is_done: bool) -> tuple[list[TracedSample], list[str]]:
    """Look the replayed samples up in the files; also return warnings about the files."""
    blends, fingerprints, notes = record.blends, record.fingerprints, []
    names = [blends.source_names[source] for source in replay.sources.tolist()]
    streams = {name: _open_source(name, blends) for name in dict.fromkeys(names)}
    for name, stream in streams.items():
        if name not in fingerprints or is_same_data(fingerprints[name], fingerprint(stream.datasets)):
            continue
        if is_done:
            raise RefusedError(
                f"source {name}: its files were replaced after the step: their fingerprint differs from "
                f"{blends.origin}; restore the old files at the paths in run.yaml"
            )
        notes.append(f"source {name}: its files were replaced since the run last read them")
    indices = enumerate(zip(names, replay.sample_indices.tolist(), strict=True))
    return [_sample(position, streams[name], index, replay.seq_length) for position, (name, index) in indices], notes


def _open_source(name: str, blends: Blends) -> TokenStream:
    grid = blends.grids.get(name)
    seq_length = grid.seq_length if grid is not None else int(blends.run["seq_length"])
    path, seed = blends.run["sources"][name]["path"], int(blends.run["seed"])
    try:
        return TokenStream.open(name, path, seq_length=seq_length, seed=seed)
    except UserError as error:
        raise UserError(
            f"source {name}: {error}; relative paths of run.yaml start in the folder where `train` ran: run trace there"
        ) from error


def _sample(position: int, stream: TokenStream, index: int, seq_length: int) -> TracedSample:
    at, num_tokens = stream.locate(index, seq_length), seq_length + 1
    parts = tuple(_document_parts(stream.datasets[at.file], at.token_offset, num_tokens))
    return TracedSample(position, at.source, index, at.epoch, at.prefix, at.token_offset, num_tokens, parts)


def _document_parts(dataset: IndexedDataset, start: int, num_tokens: int) -> Iterator[DocumentPart]:
    for pair, begin, count in dataset.file_ranges(start, num_tokens):
        first, last = pair.document_at(begin), pair.document_at(begin + count - 1)
        bounds = document_bounds(pair, first, last + 1).clip(begin, begin + count).tolist()
        for number, (offset, stop) in enumerate(pairwise(bounds), start=first):
            if offset < stop:
                yield DocumentPart(number, offset, stop - offset, pair.prefix)


def read_parts(sample: TracedSample) -> Sequence[npt.NDArray[Any]]:
    """Read the tokens of each document part of a sample."""
    pairs = {prefix: IndexedDataset(prefix) for prefix in {part.prefix for part in sample.documents}}
    return [pairs[part.prefix].read(part.first_token, part.num_tokens) for part in sample.documents]
