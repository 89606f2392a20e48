"""Which documents did step N read? Its samples, found by replaying the blend, looked up in the files."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy.typing as npt

from megatron_cpt.data import IndexedDataset, TokenStream, expand_prefixes
from megatron_cpt.data.tokenfile.documents import document_bounds
from megatron_cpt.data.tokenfile.fingerprint import fingerprint
from megatron_cpt.errors import RefusedError, UserError
from megatron_cpt.provenance.plans_file import FILE_NAME as PLANS_FILE
from megatron_cpt.provenance.plans_file import PlanRecord, read_plan_records
from megatron_cpt.provenance.replay import Progress, Replay, find_replay, possible_starts
from megatron_cpt.provenance.run_history import Blends, Recorded, Witness, read_counts, read_history


@dataclass(frozen=True)
class DocumentPart:
    """The part of a document that a sample holds.

    Attributes:
        document: its number in the file.
        first_token: the part's first token, counted in the `.bin`.
        num_tokens: tokens of it in the sample.
    """

    document: int
    first_token: int
    num_tokens: int


@dataclass(frozen=True)
class TracedSample:
    """One sample of a step.

    Attributes:
        sample: its place in the global batch, from 0.
        source: where it came from.
        k: its number in the source over the whole run.
        epoch: the source's epoch, from 0.
        prefix: the file, without `.bin`.
        first_token: its first token, counted in the `.bin`.
        num_tokens: seq_length + 1: the last one is only predicted.
        documents: what it is made of.
    """

    sample: int
    source: str
    k: int
    epoch: int
    prefix: str
    first_token: int
    num_tokens: int
    documents: tuple[DocumentPart, ...]


@dataclass(frozen=True)
class Trace:
    """What a step read.

    Attributes:
        step: the step.
        phase: the phase it belongs to.
        replayed_from: the step after which the replay began; 0: the start of the run.
        plan: where the plan that was in force is written down.
        confirmed_by: the record at or after the step that agrees with the replay; None: nothing was recorded that far,
            so this is what the step would read.
        notes: what else should be known.
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
        """Plain values; the run.yaml itself is left out."""
        return {key: value for key, value in asdict(self).items() if key != "run"}


def trace_step(run_directory: str | Path, step: int, *, progress: Progress | None = None) -> Trace:
    """Find out what a step of a run read.

    Args:
        run_directory: with plans.jsonl and, as far as there are any, metrics.jsonl and checkpoints.
        step: from 1.
        progress: for long replays.

    Raises:
        UserError: no such run, no such step in it, or its data are not where run.yaml says.
        RefusedError: it cannot be known: plans.jsonl is missing, the records contradict it, or the data were replaced.
    """
    folder = Path(run_directory)
    recorded, notes = read_history(folder)
    record = _record_of(step, read_plan_records(folder), folder)
    recorded = [checkpoint for checkpoint in recorded if record.has(checkpoint)]
    line, later_line = read_counts(folder, record.after_step, step)
    witness = _nearest(step, record, recorded, later_line)
    replay = find_replay(possible_starts(record, recorded, line, step), record.blends, step, witness, progress)
    if witness is None:
        notes.append(f"nothing is recorded of step {step}: this is what it reads under {record.blends.origin}")
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
            f"step {step}: what it read cannot be known: {folder / PLANS_FILE} begins after step "
            f"{records[0].after_step}"
        )
    return record


def _nearest(step: int, record: PlanRecord, recorded: Sequence[Recorded], line: Witness | None) -> Witness | None:
    """The first record of a record at or after a step."""
    found = [checkpoint.witness for checkpoint in recorded if checkpoint.step >= step][:1]
    found += [record.end] if record.end is not None else []
    found += [line] if line is not None and (record.end is None or line.step <= record.end.step) else []
    return min(found, key=lambda witness: witness.step, default=None)


def _locate(replay: Replay, record: PlanRecord, *, is_done: bool) -> tuple[list[TracedSample], list[str]]:
    """From (source, k) to files and documents, and what should be known about the files."""
    blends, fingerprints, notes = record.blends, record.fingerprints, []
    names = [blends.source_names[source] for source in replay.sources.tolist()]
    streams = {name: _open_source(name, blends) for name in dict.fromkeys(names)}
    for name, stream in streams.items():
        if name not in fingerprints or fingerprint(stream.datasets) == fingerprints[name]:
            continue
        if is_done:
            raise RefusedError(
                f"source {name}: its files are not those that were read: they differ from what {blends.origin} knows; "
                "put the old ones back where run.yaml looks for them"
            )
        notes.append(f"source {name}: its files are not those that the run has read so far")
    places = enumerate(zip(names, replay.ks.tolist(), strict=True))
    return [_sample(place, streams[name], k, replay.seq_length) for place, (name, k) in places], notes


def _open_source(name: str, blends: Blends) -> TokenStream:
    path = blends.run["sources"][name]["path"]
    try:
        datasets = [IndexedDataset(prefix) for prefix in expand_prefixes(path)]
    except UserError as error:
        raise UserError(
            f"source {name}: {error}; trace where `train` ran, for relative paths of run.yaml count from there"
        ) from error
    grid = blends.grids.get(name)
    seq_length = grid.seq_length if grid is not None else int(blends.run["seq_length"])
    return TokenStream(name, datasets, seq_length=seq_length, seed=int(blends.run["seed"]))


def _sample(place: int, stream: TokenStream, k: int, seq_length: int) -> TracedSample:
    found, num_tokens = stream.locate(k, seq_length), seq_length + 1
    dataset = stream.datasets[found.file]
    parts = tuple(_parts(dataset, found.token_offset, num_tokens))
    return TracedSample(place, found.source, found.k, found.epoch, found.prefix, found.token_offset, num_tokens, parts)


def _parts(dataset: IndexedDataset, start: int, num_tokens: int) -> Iterator[DocumentPart]:
    """The documents that a segment of the `.bin` is made of."""
    end = start + num_tokens
    first, last = dataset.document_at(start), dataset.document_at(end - 1)
    bounds = document_bounds(dataset, first, last + 1).clip(start, end).tolist()
    for number, (begin, stop) in enumerate(pairwise(bounds), start=first):
        if begin < stop:
            yield DocumentPart(number, begin, stop - begin)


def read_parts(sample: TracedSample) -> Sequence[npt.NDArray[Any]]:
    """The tokens of each document of a sample."""
    tokens = IndexedDataset(sample.prefix).read(sample.first_token, sample.num_tokens)
    return [tokens[part.first_token - sample.first_token :][: part.num_tokens] for part in sample.documents]
