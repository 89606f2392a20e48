"""Reader of a finished cache: the records of any range of a token file, verified when they are read."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from megatron_cpt.data.teacher_cache.cache_header import CacheHeader, file_name, read_header
from megatron_cpt.data.teacher_cache.top_k_records import Records, record_seeds
from megatron_cpt.data.tokenfile.fingerprint import fingerprint, is_same_data
from megatron_cpt.data.tokenfile.reader import IndexedDataset
from megatron_cpt.errors import RefusedError
from megatron_cpt.files.remote import RangeFile, is_file, open_ranges


class TeacherCache:
    """Finished cache of a teacher, opened for reading. No descriptor stays open.

    Args:
        path: the folder that `megatron-cpt teach` has made.

    Attributes:
        header: everything that the records depend on.

    Raises:
        RefusedError: the header is damaged, or a file is missing or was cut.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.header: CacheHeader = read_header(self.path)
        self._format = self.header.records
        self._indices: dict[str, int | None] = {}  # file of the cache by prefix of a dataset
        for index in range(len(self.header.files)):
            self._check_size(index)

    def index_of(self, dataset: IndexedDataset) -> int | None:
        """Return the index of the cached file with a dataset's content; None if the cache has none."""
        if dataset.prefix not in self._indices:
            content = fingerprint([dataset])
            same = (
                index
                for index, file in enumerate(self.header.files)
                if file.tokens == dataset.num_tokens and is_same_data(file.fingerprint, content)
            )
            self._indices[dataset.prefix] = next(same, None)
        return self._indices[dataset.prefix]

    def require(self, source: str, dataset: IndexedDataset) -> int:
        """Return the index of the cached file with a dataset's content.

        Raises:
            RefusedError: the cache does not have it; the message says whether the file is new or has changed.
        """
        index = self.index_of(dataset)
        if index is not None:
            return index
        names = {Path(file.prefix).name for file in self.header.files}
        is_known = Path(dataset.prefix).name in names
        reason = ": a file of this name had other content when the cache was made" if is_known else ""
        raise RefusedError(
            f"{self.path}: has no records of source {source}, file {dataset.prefix}, from token 0 on{reason}; "
            f"set teacher.sources.{source} to 0, or {self.advice()}"
        )

    def require_source(self, name: str, datasets: Iterable[IndexedDataset], seq_length: int) -> None:
        """Check that the cache has all files of a source with a sample of `seq_length` tokens; see `require`."""
        for dataset in datasets:
            if dataset.num_tokens > seq_length:  # a shorter file has no sample
                self.require(name, dataset)

    def advice(self) -> str:
        """Return the end of a message: the command that makes a cache again."""
        command = shlex.join(["megatron-cpt", "teach", self.header.teacher_path, "--run", "RUN.yaml"])
        return f"make a cache of this run's files: {command} --output NEW_CACHE --top-k {self.header.top_k}"

    def read(self, index: int, starts: Sequence[int], count: int) -> list[Records]:
        """Return the records of `count` positions from each start of a file, one contiguous read each.

        Args:
            index: result of `require`.

        Raises:
            RefusedError: a record is damaged, or the file was cut or replaced.
        """
        size = self._format.num_bytes
        found = []
        with self._open(index) as file:
            for start in starts:
                file.will_read(start * size, count * size)
            for start in starts:
                records = np.zeros(count, self._format.dtype)
                done = file.read_into(records.view(np.uint8).data, start * size)
                self._verify(index, records, start, done // size)
                found.append(records)
        return found

    def _verify(self, index: int, records: Records, start: int, num_read: int) -> None:
        intact = self._format.is_intact(records, record_seeds(self.header.key(index), start, len(records)))
        intact[num_read:] = False
        if not intact.all():
            file, offset = self.header.files[index], start + int(np.argmin(intact))
            raise RefusedError(
                f"{self._name(index)}: the record of source {file.source}, file {file.prefix}, token {offset} is "
                f"damaged or missing; copy the cache again, or {self.advice()}"
            )

    def _check_size(self, index: int) -> None:
        if not is_file(self._name(index)):  # opening a FIFO waits for a writer
            raise self._missing(index)
        expected = self.header.grid(index).num_positions * self._format.num_bytes
        with self._open(index) as file:
            found = file.size
        if found != expected:
            name = self.header.files[index]
            raise RefusedError(
                f"{self._name(index)}: has {found:,} bytes instead of {expected:,} (source {name.source}, file "
                f"{name.prefix}): it was cut or replaced; copy the cache again, or {self.advice()}"
            )

    def _open(self, index: int) -> RangeFile:
        try:
            return open_ranges(self._name(index))
        except FileNotFoundError as error:
            raise self._missing(index) from error

    def _missing(self, index: int) -> RefusedError:
        return RefusedError(f"{self._name(index)}: missing; copy the cache again, or {self.advice()}")

    def _name(self, index: int) -> str:
        return str(self.path / file_name(index))
