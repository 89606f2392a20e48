"""Which documents did step N read? Its samples, found by replaying the blend, looked up in the files."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy.typing as npt

from megatron_cpt.data import IndexedDataset, TokenStream, expand_prefixes
from megatron_cpt.data.document_blocks import document_bounds
from megatron_cpt.data.fingerprint import fingerprint
from megatron_cpt.errors import RefusedError, UserError
from megatron_cpt.train.replay import Progress, Replay, find_replay, possible_starts
from megatron_cpt.train.run_history import Blends, read_blends, read_history, witnesses


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
        plan: the run.yaml that was in force.
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
        run_directory: with run.yaml, plan.json and, as far as there are any, checkpoints.
        step: from 1.
        progress: for long replays.

    Raises:
        UserError: no such run, no such step in it, or its data are not where run.yaml says.
        RefusedError: it cannot be known: the records contradict every plan that is known, or the data were replaced.
    """
    folder = Path(run_directory)
    recorded, notes = read_history(folder)
    before = next((checkpoint for checkpoint in reversed(recorded) if checkpoint.step < step), None)
    after = next((checkpoint for checkpoint in recorded if checkpoint.step >= step), None)
    now = read_blends(folder)
    _check_step(step, after.blends if after is not None else now, folder)
    line, witness = witnesses(folder, recorded, step)
    replay = find_replay(possible_starts(before, after, now, line, step), step, witness, progress)
    if witness is None:
        notes.append(f"nothing is recorded of step {step}: this is what it reads under {now.origin}")
    known = after or before
    samples, about_files = _locate(replay, known.fingerprints if known else {}, is_certain=after is not None)
    return Trace(
        step=step,
        phase=replay.phase,
        replayed_from=replay.start.step,
        plan=replay.start.blends.origin,
        confirmed_by=witness.origin if witness is not None else None,
        notes=(*notes, *about_files),
        run=replay.start.blends.run,
        samples=tuple(samples),
    )


def _check_step(step: int, blends: Blends, folder: Path) -> None:
    if not 1 <= step <= blends.last_step:
        raise UserError(f"--step {step}: the steps of {folder} are 1 to {blends.last_step}")


def _locate(
    replay: Replay, fingerprints: Mapping[str, str], *, is_certain: bool
) -> tuple[list[TracedSample], list[str]]:
    """From (source, k) to files and documents, and what should be known about the files."""
    blends, notes = replay.start.blends, []
    names = [blends.source_names[source] for source in replay.sources.tolist()]
    streams = {name: _open_source(name, blends) for name in dict.fromkeys(names)}
    for name, stream in streams.items():
        if name not in fingerprints or fingerprint(stream.datasets) == fingerprints[name]:
            continue
        if is_certain:
            raise RefusedError(
                f"source {name}: its files are not those that were read: they differ from what the checkpoint after "
                "the step knows; put the old ones back where run.yaml looks for them"
            )
        notes.append(f"source {name}: its files are not those that the last checkpoint knows")
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
    """The documents that a stretch of the `.bin` is made of."""
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
