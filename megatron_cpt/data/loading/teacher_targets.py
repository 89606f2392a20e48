"""The teacher's most likely tokens at every position of some samples, read from a cache."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from megatron_cpt.data.loading.batch import DocumentOptions, TeacherTargets
from megatron_cpt.data.loading.stream import TokenStream
from megatron_cpt.data.teacher_cache.read_cache import TeacherCache
from megatron_cpt.data.tokenfile.sidecar import name_tokenizer
from megatron_cpt.errors import RefusedError, UserError


@dataclass(frozen=True)
class CachedTeacher:
    """Cache of a teacher with the sources that are read from it.

    Attributes:
        cache: the opened cache.
        sources: names of the sources with a teacher; samples of other sources get zeros.
    """

    cache: TeacherCache
    sources: frozenset[str]

    @property
    def digest(self) -> str:
        """Hash of the teacher and of the options of the cache."""
        return self.cache.header.digest

    @classmethod
    def open(
        cls,
        path: str,
        streams: Collection[TokenStream],
        sources: Collection[str],
        *,
        documents: DocumentOptions,
        vocab_size: int,
        tokenizer: tuple[str, str] | None,
    ) -> CachedTeacher:
        """Open a cache and compare it with a run.

        Args:
            path: the folder that `megatron-cpt teach` has made.
            streams: all sources of the run.
            sources: names of the sources with a teacher.
            documents: treatment of document boundaries in the run.
            vocab_size: ids of the student.
            tokenizer: name and fingerprint of the tokenizer of the run's ids; None: unknown.

        Raises:
            UserError: a source moves tokens (fill-in-the-middle), which no cache can know.
            RefusedError: the cache is damaged, lacks a file, or belongs to other ids or other document options.
        """
        cache = TeacherCache(path)
        header = cache.header
        if header.tokenizer is not None and tokenizer is not None and header.tokenizer != tokenizer[1]:
            raise RefusedError(
                f"{path}: its ids are of tokenizer {header.tokenizer[:12]}, this run has {name_tokenizer(*tokenizer)}: "
                f"equal ids mean other text; {cache.advice()}"
            )
        if vocab_size < header.vocab:
            raise RefusedError(
                f"{path}: holds ids below {header.vocab:,}, model.vocab is {vocab_size:,}; choose a teacher with the "
                "vocabulary of the model"
            )
        if documents.attention_key != dict(header.documents):
            raise RefusedError(
                f"{path}: was made with documents {dict(header.documents)}, the run has {documents.attention_key}; set "
                f"the keys of `documents` alike, or {cache.advice()}"
            )
        for stream in streams:
            if stream.name in sources:
                if stream.fim is not None:
                    raise UserError(
                        f"teacher.cache: source {stream.name} has `fim`, which moves tokens, so a cache has no records "
                        f"of its samples; set teacher.sources.{stream.name} to 0, or use teacher.from"
                    )
                cache.require_source(stream.name, stream.datasets, stream.seq_length)
        return cls(cache, frozenset(sources))

    def read(
        self,
        streams: Sequence[TokenStream],
        sources: npt.NDArray[np.int64],
        sample_indices: npt.NDArray[np.int64],
        seq_length: int | None = None,
    ) -> TeacherTargets:
        """Return the targets of samples; arguments as for `read_samples`.

        Raises:
            RefusedError: the cache lacks a record, or it is damaged.
        """
        length = seq_length or streams[0].seq_length
        wanted: dict[int, list[tuple[int, int]]] = defaultdict(list)  # by cached file: (position, row of the result)
        for row, (source, index) in enumerate(zip(sources.tolist(), sample_indices.tolist(), strict=True)):
            stream = streams[source]
            if stream.name in self.sources:
                location = stream.locate(index, seq_length)
                file = self.cache.require(stream.name, stream.datasets[location.file])
                wanted[file].append((location.token_offset, row))
        records = np.zeros((len(sources), length), self.cache.header.records.dtype)
        records["ids"] = np.arange(self.cache.header.top_k)  # different ones, as the loss expects of every record
        for file, reads in wanted.items():
            found = self.cache.read(file, [start for start, _ in reads], length)
            for (_, row), own in zip(reads, found, strict=True):
                records[row] = own
        # torch takes no array whose strides are not a multiple of its element size
        fields = {name: np.ascontiguousarray(records[name]) for name in ("ids", "log_probs", "log_tail")}
        return TeacherTargets(**fields)
