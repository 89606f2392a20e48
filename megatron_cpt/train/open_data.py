"""Token files of a run -> streams, the loader of training batches, and the validator."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import torch.distributed as dist

from megatron_cpt.backend import Ranks
from megatron_cpt.backend.collectives import gathered, on_all
from megatron_cpt.checkpoint.record import corrupt_as_refused
from megatron_cpt.config import RunConfig
from megatron_cpt.data import (
    BlendCursor,
    Loader,
    PhaseBlend,
    TokenStream,
    validation_batches,
)
from megatron_cpt.data.loading.batch import DocumentOptions
from megatron_cpt.data.loading.fim import fill_in_middle
from megatron_cpt.data.loading.teacher_targets import CachedTeacher
from megatron_cpt.data.tokenfile.disk_cache import keep_on_disk
from megatron_cpt.data.tokenfile.fingerprint import is_touched
from megatron_cpt.data.tokenfile.header import read_header
from megatron_cpt.data.tokenfile.listed_documents import open_dataset, open_source
from megatron_cpt.data.tokenfile.sidecar import content_faults, read_sidecar
from megatron_cpt.errors import RefusedError
from megatron_cpt.files.remote import is_remote
from megatron_cpt.planning import RunPlan
from megatron_cpt.train.device_batch import Upload
from megatron_cpt.train.state import TrainState
from megatron_cpt.train.validation import Validator

logger = logging.getLogger(__name__)

_VALIDATION_SEED = 1234  # of every run: runs of several seeds are compared on the same samples


def open_streams(config: RunConfig, eod_id: int | None) -> dict[str, TokenStream]:
    """Open the token stream of every source, by name, in the order of run.yaml."""
    streams = {}
    for name, source in config.sources.items():
        datasets = open_source(source.paths)
        if source.cache is not None:
            keep_on_disk(datasets, source.cache)
        fim = fill_in_middle(name, source.fim, eod_id)
        streams[name] = TokenStream(name, datasets, seq_length=config.span_length(name), seed=config.seed, fim=fim)
    return streams


def document_options(config: RunConfig, eod_id: int | None) -> DocumentOptions:
    """Return the treatment of document boundaries in a run."""
    documents = config.documents
    return DocumentOptions(eod_id, documents.reset_attention, documents.reset_positions, documents.eod_loss)


def verify_data(prefixes: Mapping[str, Sequence[str]], note: Callable[[str], None]) -> None:
    """Compare the files of all sources with the content hashes in their sidecars; a collective call.

    Each dataset is read by one rank. Datasets without a sidecar and those in an object store are skipped.

    Args:
        prefixes: dataset prefixes and document lists per source.
        note: called during the work, with its name.

    Raises:
        RefusedError: on all ranks, if a file differs.
    """

    def verify() -> None:
        named = dict.fromkeys(prefix for some in prefixes.values() for prefix in some)
        pairs = dict.fromkeys(pair.prefix for prefix in named for pair in open_dataset(prefix).parts)
        own = [prefix for prefix in pairs if not is_remote(prefix)][dist.get_rank() :: dist.get_world_size()]
        faults = []
        for prefix in own:
            sidecar = read_sidecar(read_header(prefix))
            if sidecar is not None:
                faults += content_faults(prefix, sidecar, lambda _: note("verifying data"))
        if faults:
            raise RefusedError("; ".join(f"{path}: {problem}" for path, problem in faults))

    on_all(verify)


def verify_touched_data(
    saved: Mapping[str, str],
    now: Mapping[str, str],
    streams: Mapping[str, TokenStream],
    note: Callable[[str], None],
) -> None:
    """Compare the content of sources whose files have other times than when the checkpoint was saved; collective.

    Their fingerprints agree otherwise, so the files were copied, or replaced by others with equal ends.

    Args:
        saved, now: fingerprints with times, by source.
        note: called during the work, with its name.

    Raises:
        RefusedError: on all ranks, if a file differs from its sidecar.
    """
    touched = gathered([name for name in now if name in saved and is_touched(saved[name], now[name])])
    if not touched:
        return
    prefixes = {name: [dataset.prefix for dataset in streams[name].datasets] for name in touched}
    if dist.get_rank() == 0:
        logger.info(
            "the files of %s have other modification times than when the checkpoint was saved: their content is "
            "compared with their sidecars",
            ", ".join(touched),
        )
        every = {pair.prefix: pair for name in touched for data in streams[name].datasets for pair in data.parts}
        if without := [prefix for prefix, pair in every.items() if read_sidecar(pair.header) is None]:
            logger.warning(
                "%s: no sidecar PREFIX.json, so only ends and some blocks of the files could be compared with the "
                "files of the checkpoint",
                ", ".join(without),
            )
    verify_data(prefixes, note)


def build_loader(
    config: RunConfig,
    plan: RunPlan,
    ranks: Ranks,
    streams: dict[str, TokenStream],
    documents: DocumentOptions,
    state: TrainState,
    own: Path | None,
    upload: Upload,
    teacher: CachedTeacher | None = None,
) -> Loader:
    """Build the loader of this rank's batches from the next step on.

    Args:
        teacher: cache whose targets are read; None: no targets are read.

    Raises:
        RefusedError: the blend's state in the checkpoint `own` is damaged.
    """
    phases = [
        PhaseBlend(phase.name, phase.first_sample, phase.num_samples, phase.weights, phase.seq_length)
        for phase in plan.phases
    ]
    grids = {name: stream.grid for name, stream in streams.items()}
    cursor = BlendCursor(phases, list(streams), limits=plan.span_limits, grids=grids)
    if state.data is not None:
        with corrupt_as_refused(own):
            cursor.load_state_dict(state.data)
    return Loader(
        list(streams.values()),
        cursor,
        global_batch=lambda samples: plan.segment_from(samples).global_batch,
        micro_batch=lambda samples: plan.segment_from(samples).micro_batch,
        data_parallel_rank=ranks.data_parallel_rank,
        data_parallel_size=ranks.data_parallel_size,
        vocab_size=config.model.vocab,
        documents=documents,
        teacher=teacher,
        upload=upload,
    )


def build_validator(
    config: RunConfig, ranks: Ranks, documents: DocumentOptions, upload: Upload, contributes_loss: bool
) -> Validator | None:
    """Build the validator; None if the run has no `validation` section."""
    if config.validation is None:
        return None
    batches = {}
    for name, paths in config.validation.sources.items():
        datasets = open_source([paths] if isinstance(paths, str) else list(paths))
        # Always in the run's seq_length, even in phases with another one, so that losses compare over the run.
        batches[name] = partial(
            validation_batches,
            TokenStream(name, datasets, seq_length=config.seq_length, seed=_VALIDATION_SEED),
            num_samples=config.validation.batches * config.batch.global_,
            micro_batch=config.batch.micro,
            data_parallel_rank=ranks.data_parallel_rank,
            data_parallel_size=ranks.data_parallel_size,
            vocab_size=config.model.vocab,
            documents=documents,
        )
    group = config.batch.global_ // (config.batch.micro * ranks.data_parallel_size)
    return Validator(batches, group, upload, contributes_loss)
