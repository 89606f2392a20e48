"""Plan of a cache: the header with everything that decides its content, its size and its work. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_cpt.checkpoint.record import SavedRun
from megatron_cpt.config import RunConfig, format_bytes, format_count, format_duration
from megatron_cpt.data.loading.batch import DocumentOptions
from megatron_cpt.data.teacher_cache.cache_header import CacheHeader, TaughtFile
from megatron_cpt.data.teacher_cache.top_k_records import DEFAULT_TOP_K
from megatron_cpt.data.tokenfile.fingerprint import fingerprint
from megatron_cpt.data.tokenfile.listed_documents import open_source
from megatron_cpt.data.tokenfile.reader import IndexedDataset
from megatron_cpt.errors import UserError
from megatron_cpt.planning import flops_per_token
from megatron_cpt.planning.hardware import GPUS

_FORWARD_SHARE = 1 / 3  # of the operations of training
_SPEED_SHARE = 0.4  # of the peak, a usual share of forward passes
_REFERENCE_GPU = "h100"


@dataclass(frozen=True)
class TeachOptions:
    """Options of `megatron-cpt teach`.

    Attributes:
        top_k: tokens per record.
        window: tokens that the teacher reads at once; None: the longest sequence of the run.
        stride: distance of the starts of two windows; None: half of the window.
        sources: names of the sources; empty: those with a teacher in the run, by default all.
        overrides: `key=value` of the teacher's layout and precision, such as `parallel.tensor=2`.
        restart: discard earlier progress.
    """

    top_k: int = DEFAULT_TOP_K
    window: int | None = None
    stride: int | None = None
    sources: Sequence[str] = ()
    overrides: Sequence[str] = ()
    restart: bool = False


@dataclass(frozen=True)
class CachePlan:
    """Cache that will be made.

    Attributes:
        header: everything that the records depend on.
        datasets: the token files, in the order of `header.files`.
        teacher: the run that builds the teacher, with its layout.
        documents: treatment of document boundaries.
    """

    header: CacheHeader
    datasets: tuple[IndexedDataset, ...]
    teacher: RunConfig
    documents: DocumentOptions

    @property
    def forward_tokens(self) -> int:
        """Tokens that go through the teacher."""
        header = self.header
        return sum(header.grid(index).num_windows for index in range(len(header.files))) * header.window

    def describe(self) -> str:
        """Return the size and the work in one line."""
        header, model = self.header, self.teacher.model
        flops = self.forward_tokens * flops_per_token(model, header.window).causal * _FORWARD_SHARE
        seconds = flops / (_SPEED_SHARE * GPUS[_REFERENCE_GPU].bf16)
        time = format_duration(round(seconds)) if seconds >= 1 else "under 1s"
        files = f"{len(header.files)} file{'' if len(header.files) == 1 else 's'}"
        return (
            f"{format_count(header.num_positions)} tokens of {files} x {header.records.num_bytes} bytes (top "
            f"{header.top_k} of {model.vocab:,}) = {format_bytes(header.num_bytes)}; "
            f"{format_count(self.forward_tokens)} tokens through the teacher in windows of {header.window}, stride "
            f"{header.stride}: {flops:.3g} FLOP, {time} on one H100 at {_SPEED_SHARE:.0%} of its bf16 peak"
        )


def plan_cache(
    saved: SavedRun,
    teacher: RunConfig,
    run: RunConfig,
    options: TeachOptions,
    *,
    digest: str,
    documents: DocumentOptions,
    tokenizer_fingerprint: str | None,
) -> CachePlan:
    """Find the files of a run and plan the cache of a teacher for them.

    Args:
        saved: the teacher's checkpoint.
        teacher: the run that builds the teacher.
        run: the run that will be trained.
        digest: of the teacher's weights.
        documents: treatment of document boundaries in the run.
        tokenizer_fingerprint: of the run's ids; None: unknown.

    Raises:
        UserError: an option is wrong, or no file is left.
        RefusedError: a file is damaged.
    """
    if teacher.model.vocab > run.model.vocab:
        raise UserError(
            f"{saved.path}: the teacher has {teacher.model.vocab:,} ids, the model of the run {run.model.vocab:,}; "
            "choose a teacher with the vocabulary of the model"
        )
    window = _window(options, run, teacher)
    stride = options.stride if options.stride is not None else max(1, window // 2)
    if not 1 <= options.top_k <= teacher.model.vocab:
        raise UserError(f"--top-k: {options.top_k}; give 1 to {teacher.model.vocab:,}, the ids of the teacher")
    if not 1 <= stride <= window:
        raise UserError(f"--stride: {stride}; give 1 to {window:,}, the window")
    files: dict[tuple[str, int], tuple[TaughtFile, IndexedDataset]] = {}
    for name in _sources(options, run):
        for dataset in open_source(run.sources[name].paths):
            if dataset.num_tokens > run.span_length(name):  # a shorter file has no sample
                file = TaughtFile(name, dataset.prefix, fingerprint([dataset]), dataset.num_tokens)
                files.setdefault((file.fingerprint, file.tokens), (file, dataset))  # sources may share a file
    if not files:
        raise UserError("--run: no file of the sources is as long as one sample; there is nothing to teach")
    header = CacheHeader(
        teacher=digest,
        teacher_path=str(saved.path),
        precision=teacher.precision.model_dump(mode="json"),
        tokenizer=tokenizer_fingerprint,
        vocab=teacher.model.vocab,
        top_k=options.top_k,
        window=window,
        stride=stride,
        documents=documents.attention_key,
        files=tuple(file for file, _ in files.values()),
    )
    return CachePlan(header, tuple(dataset for _, dataset in files.values()), teacher, documents)


def check_space(plan: CachePlan, output: Path, free_bytes: int) -> None:
    """Raise `UserError` if the disk of the output is too small for the cache.

    Args:
        free_bytes: free on the disk, and used by earlier progress of this cache.
    """
    if plan.header.num_bytes > free_bytes:
        raise UserError(
            f"--output {output}: the cache takes {format_bytes(plan.header.num_bytes)}, the disk has "
            f"{format_bytes(free_bytes)} free; free some space, choose another output, fewer sources (--source) or a "
            "smaller --top-k"
        )


def _window(options: TeachOptions, run: RunConfig, teacher: RunConfig) -> int:
    limit = teacher.model.max_positions or run.longest_sequence
    window = options.window if options.window is not None else min(run.longest_sequence, limit)
    if not 1 <= window <= max(limit, run.longest_sequence):
        raise UserError(f"--window: {window}; give 1 to {max(limit, run.longest_sequence):,} tokens")
    return window


def _sources(options: TeachOptions, run: RunConfig) -> list[str]:
    """Return the names of the sources, in the order of run.yaml."""
    if unknown := [name for name in options.sources if name not in run.sources]:
        raise UserError(f"--source: {unknown[0]}; the run has {', '.join(run.sources)}")
    wanted = set(options.sources)
    if not wanted:
        section = run.teacher
        wanted = {name for name in run.sources if section is None or section.distills(name)}
    if moved := [name for name in run.sources if name in wanted and run.sources[name].fim is not None]:
        raise UserError(
            f"sources.{moved[0]}.fim: fill-in-the-middle moves tokens, so records by position do not fit its samples; "
            f"name the other sources (--source), and set teacher.sources.{moved[0]} to 0, or use teacher.from"
        )
    return [name for name in run.sources if name in wanted]
