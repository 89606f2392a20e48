"""Sources of a recipe and their held-out data: given, or split off by a hash of each document.

A split is written once: the next call with the same data, share and seed finds it. Training then reads the rest, so no
document that is validated is trained on, nor an exact copy of one.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from urllib.parse import quote

from megatron_cpt.data.rewrite.split import split_datasets
from megatron_cpt.data.tokenfile.header import IndexHeader, read_header
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
        prefixes: the datasets of the source.
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
        UserError: a file is missing, or the held-out data is the source itself.
        RefusedError: a file is damaged.
    """
    prefixes = expand_prefixes(list(paths))
    headers = [read_header(prefix) for prefix in prefixes]
    source = RecipeSource(name, paths, prefixes, [header.num_tokens for header in headers], _documents(headers))
    if held_out is None:
        return source
    tokens = sum(read_header(prefix).num_tokens for prefix in expand_prefixes(list(held_out)))
    return replace(source, held_out=held_out, held_out_tokens=tokens)


def refuse_trained_held_out(sources: Sequence[RecipeSource]) -> None:
    """Refuse held-out data that is also a source.

    Raises:
        UserError: a dataset is in both.
    """
    trained = {_real(prefix): source.name for source in sources for prefix in source.prefixes}
    for source in sources:
        for prefix in expand_prefixes(list(source.held_out or ())) if source.held_out else ():
            if (other := trained.get(_real(prefix))) is not None:
                raise UserError(
                    f"--held-out {source.name}={prefix}: is also trained on, as source {other}; give other data, or "
                    "let --split hold documents out"
                )


@contextlib.contextmanager
def split_sources(
    sources: Sequence[RecipeSource],
    folder: Path,
    *,
    share: float,
    overwrite: bool,
    progress: Callable[[int], None] = lambda amount: None,
) -> Iterator[list[RecipeSource]]:
    """Split held-out data off the sources that have none; yield all sources with held-out data.

    If the block raises, the files that this call has written are removed.

    Args:
        folder: place of the new datasets, `NAME-train` and `NAME-held-out`.
        share: share of the documents to hold out.
        overwrite: replace datasets of these names that are another split.
        progress: called with the number of bytes after each block.

    Raises:
        UserError: a name is taken, or the share holds no document out.
    """
    written: list[str] = []
    try:
        yield [
            source if source.held_out else _split(source, folder, share, overwrite, progress, written)
            for source in sources
        ]
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
    overwrite: bool,
    progress: Callable[[int], None],
    written: list[str],
) -> RecipeSource:
    stem = quote(source.name, safe="")  # a name may hold a slash
    train, held_out = (str(folder / f"{stem}-{side}") for side in ("train", "held-out"))
    if not _is_split(source, train, held_out, share):
        folder.mkdir(parents=True, exist_ok=True)
        report = split_datasets(
            source.prefixes,
            held_out,
            train,
            fraction=share,
            seed=SPLIT_SEED,
            overwrite=overwrite,
            progress=progress,
        )
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


def _is_split(source: RecipeSource, train: str, held_out: str, share: float) -> bool:
    """Return whether two datasets are this split of the source, from an earlier call."""
    if not all(exists(f"{prefix}{ending}") for prefix in (train, held_out) for ending in _ENDINGS):
        return False
    headers = [read_header(prefix) for prefix in (train, held_out)]
    sidecars = [read_sidecar(header) for header in headers]
    made_by = {
        "command": "split",
        "inputs": [os.path.basename(prefix) for prefix in source.prefixes],
        "fraction": share,
        "seed": SPLIT_SEED,
    }
    return (
        all(sidecar is not None and dict(sidecar.origin.made_by) == made_by for sidecar in sidecars)
        and sum(header.num_tokens for header in headers) == source.tokens
        and _documents(headers) == source.documents
        and not any(_is_newer(prefix, held_out) for prefix in source.prefixes)
    )


def _is_newer(prefix: str, split: str) -> bool:
    return not is_remote(prefix) and os.path.getmtime(f"{prefix}.bin") > os.path.getmtime(f"{split}.bin")


def _documents(headers: Sequence[IndexHeader]) -> int:
    return sum(header.num_documents for header in headers)


def _real(prefix: str) -> str:
    return prefix if is_remote(prefix) else os.path.realpath(f"{prefix}.bin")


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
