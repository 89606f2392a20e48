"""Sources of a recipe and their held-out data: given, or split off by a hash of each document.

A split is written once: the next call with the same data, share and seed finds it. Training then reads the rest, so no
document that is validated is trained on, nor an exact copy of one.
"""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import quote

from megatron_cpt.data.rewrite.split import split_datasets
from megatron_cpt.data.tokenfile.document_list import is_document_list
from megatron_cpt.data.tokenfile.fingerprint import fingerprint, is_same_data
from megatron_cpt.data.tokenfile.header import LIST_ENDING, IndexHeader, read_header
from megatron_cpt.data.tokenfile.listed_documents import open_dataset
from megatron_cpt.data.tokenfile.reader import expand_prefixes
from megatron_cpt.data.tokenfile.sidecar import read_sidecar
from megatron_cpt.errors import UserError
from megatron_cpt.files.remote import is_remote
from megatron_cpt.files.whole_io import exists
from megatron_cpt.planning.timeline.epochs import samples_in_epoch

SPLIT_SEED = 1234
_ENDINGS = (".bin", ".idx", ".json")


@dataclass(frozen=True)
class RecipeSource:
    """Source of a run, and the data that its loss is measured on.

    Attributes:
        path: prefixes or globs as run.yaml has them; one of them is not a list.
        prefixes: the datasets and document lists of the source.
        sizes: tokens of each of them.
        documents: number of their documents.
        held_out: prefixes or globs of its held-out data; None: not chosen yet.
        held_out_tokens: size of that data.
        split_from: prefixes that training data and held-out data were split from; empty: the held-out data was given.
    """

    name: str
    path: Sequence[str]
    prefixes: Sequence[str]
    sizes: Sequence[int]
    documents: int
    held_out: Sequence[str] | None = None
    held_out_tokens: int = 0
    split_from: Sequence[str] = ()

    @property
    def tokens(self) -> int:
        """Size of the source in tokens."""
        return sum(self.sizes)

    def samples(self, seq_length: int) -> int:
        """Return the sequences per epoch."""
        return sum(samples_in_epoch(size, seq_length) for size in self.sizes)


def read_source(name: str, paths: Sequence[str], held_out: Sequence[str] | None) -> RecipeSource:
    """Read the sizes of a source and of its held-out data, if that is given.

    Raises:
        UserError: a file is missing, or a document list has no held-out data.
        RefusedError: a file is damaged.
    """
    prefixes = expand_prefixes(list(paths))
    if held_out is None and (lists := list(filter(is_document_list, prefixes))):
        raise UserError(
            f"source {name}: {lists[0]}: --split cannot divide a document list; give --held-out {name}=PREFIX, or "
            f"mine a dataset instead of a list: `megatron-cpt mine --output {lists[0].removesuffix(LIST_ENDING)}`"
        )
    headers = [_read_size(prefix) for prefix in prefixes]
    source = RecipeSource(name, paths, prefixes, [header.num_tokens for header in headers], _documents(headers))
    if held_out is None:
        return source
    tokens = sum(_read_size(prefix).num_tokens for prefix in expand_prefixes(list(held_out)))
    return replace(source, held_out=held_out, held_out_tokens=tokens)


def expect_rest(source: RecipeSource, share: float) -> RecipeSource:
    """Return a source as a split will leave it, rather too small than too large.

    The number of held-out documents has a standard deviation of sqrt(share (1 - share) documents). Nine of them in
    documents of mean length are four of the tokens if the lengths deviate by twice their mean.
    """
    deviation = math.sqrt(share * (1.0 - share) / max(1, source.documents))
    rest = max(0, math.floor(source.tokens * (1.0 - share - 9.0 * deviation)))
    return replace(source, prefixes=source.prefixes[:1], sizes=[rest])


@contextlib.contextmanager
def split_sources(
    sources: Sequence[RecipeSource],
    folder: Path,
    *,
    share: float,
    progress: Callable[[int], None] = lambda amount: None,
) -> Iterator[list[RecipeSource]]:
    """Split held-out data off the sources that have none; yield all sources with held-out data.

    Earlier splits are found again, and never replaced: the run of another recipe may train on them. If the block
    raises, the files that this call has written are removed.

    Args:
        folder: place of the new datasets, `NAME-train` and `NAME-held-out`.
        share: share of the documents to hold out.
        progress: called with the number of bytes after each block.

    Raises:
        UserError: a name is taken by another split, or the share holds no document out.
    """
    for source in sources:  # before hours of splitting
        if not source.held_out:
            _refuse_other_split(source, *_outputs(source, folder), share)
    written: list[str] = []
    try:
        yield [source if source.held_out else _split(source, folder, share, progress, written) for source in sources]
    except BaseException:
        for prefix in written:
            for ending in _ENDINGS:
                Path(f"{prefix}{ending}").unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # other splits are in it
            folder.rmdir()
        raise


def _split(
    source: RecipeSource,
    folder: Path,
    share: float,
    progress: Callable[[int], None],
    written: list[str],
) -> RecipeSource:
    train, held_out = _outputs(source, folder)
    if not _is_split(source, train, held_out, share):
        folder.mkdir(parents=True, exist_ok=True)
        report = split_datasets(source.prefixes, held_out, train, fraction=share, seed=SPLIT_SEED, progress=progress)
        written += [train, held_out]
        if not report.held_out_documents or not report.rest_documents:
            raise UserError(
                f"--split: source {source.name}: {report.held_out_documents:,} of its {source.documents:,} documents "
                f"would be held out at {share:.4g}; choose another share, or give --held-out {source.name}=PREFIX"
            )
    rest = read_header(train)
    return replace(
        source,
        path=[train],
        prefixes=[train],
        sizes=[rest.num_tokens],
        documents=rest.num_documents,
        held_out=[held_out],
        held_out_tokens=read_header(held_out).num_tokens,
        split_from=source.prefixes,
    )


def _outputs(source: RecipeSource, folder: Path) -> tuple[str, str]:
    """Return the prefixes of training data and held-out data."""
    stem = quote(source.name, safe="")  # a name may hold a slash
    return str(folder / f"{stem}-train"), str(folder / f"{stem}-held-out")


def _refuse_other_split(source: RecipeSource, train: str, held_out: str, share: float) -> None:
    """Refuse to replace datasets that are not this split."""
    there = [f"{prefix}{end}" for prefix in (train, held_out) for end in _ENDINGS if exists(f"{prefix}{end}")]
    if not there or _is_split(source, train, held_out, share):
        return
    sidecar = read_sidecar(read_header(train)) if len(there) == 2 * len(_ENDINGS) else None
    made_by = sidecar.origin.made_by if sidecar is not None else {}
    wanted = _describe_split(_made_by(source, share))
    if made_by.get("command") != "split":
        problem = f"{there[0]}: exists already, and is not part of a complete split of {wanted}"
    elif (found := _describe_split(made_by)) == wanted:
        problem = f"{train}: is a split of {wanted}, but of other data of this name, or of the data before it changed"
    else:
        problem = f"{train}: is a split of {found}, not of {wanted}"
    raise UserError(
        f"source {source.name}: {problem}; another recipe may use it, so it is not replaced; choose another folder: "
        "--split-dir DIR"
    )


def _describe_split(made_by: Mapping[str, Any]) -> str:
    return f"{', '.join(made_by['inputs'])} at {made_by['fraction'] * 100:.6g}% (seed {made_by['seed']})"


def _made_by(source: RecipeSource, share: float) -> dict[str, Any]:
    """Return what the sidecars of a split of a source say, except for the fingerprint of the data."""
    return {
        "command": "split",
        "inputs": [os.path.basename(prefix) for prefix in source.prefixes],
        "fraction": share,
        "seed": SPLIT_SEED,
    }


def _is_split(source: RecipeSource, train: str, held_out: str, share: float) -> bool:
    """Return whether two datasets are this split of the source, from an earlier call."""
    if not all(exists(f"{prefix}{ending}") for prefix in (train, held_out) for ending in _ENDINGS):
        return False
    headers = [read_header(prefix) for prefix in (train, held_out)]
    sidecars = [read_sidecar(header) for header in headers]
    return (
        all(sidecar is not None and _is_made_by(sidecar.origin.made_by, source, share) for sidecar in sidecars)
        and sum(header.num_tokens for header in headers) == source.tokens
        and _documents(headers) == source.documents
        and not any(_is_newer(prefix, held_out) for prefix in source.prefixes)
    )


def _is_made_by(made_by: Mapping[str, Any], source: RecipeSource, share: float) -> bool:
    recorded = dict(made_by)
    data = recorded.pop("data", None)  # base names and sizes agree for other data too
    if recorded != _made_by(source, share) or not isinstance(data, str):
        return False
    return is_same_data(data, fingerprint([open_dataset(prefix) for prefix in source.prefixes]))


def _is_newer(prefix: str, split: str) -> bool:
    return not is_remote(prefix) and os.path.getmtime(f"{prefix}.bin") > os.path.getmtime(f"{split}.bin")


def _read_size(prefix: str) -> IndexHeader:
    """Return the sizes of a dataset or of the documents that a list names."""
    return open_dataset(prefix).header if is_document_list(prefix) else read_header(prefix)


def _documents(headers: Sequence[IndexHeader]) -> int:
    return sum(header.num_documents for header in headers)


def group_by_name(entries: Sequence[str], option: str) -> Mapping[str, list[str]]:
    """Return the values of `NAME=VALUE` entries by name; a name that occurs again adds a value.

    Raises:
        UserError: an entry has no name or no value.
    """
    found: dict[str, list[str]] = {}
    for entry in entries:
        name, separator, value = entry.partition("=")
        if not separator or not name or not value:
            raise UserError(f"{option} {entry}: write NAME=VALUE, such as {option} web=...")
        found.setdefault(name, []).append(value)
    return found
