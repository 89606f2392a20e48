"""A prepared run -> everything that training needs, as one named result."""

from __future__ import annotations

import gc
import logging
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from megatron.core.optimizer import MegatronOptimizer

from megatron_cpt.backend import Ranks, seed_everything
from megatron_cpt.checkpoint import layout
from megatron_cpt.checkpoint.loading.find_valid import newest_valid
from megatron_cpt.checkpoint.manifest import CorruptCheckpointError
from megatron_cpt.checkpoint.record import corrupt_as_refused
from megatron_cpt.checkpoint.saving.publish import Retention
from megatron_cpt.checkpoint.saving.saver import Saver
from megatron_cpt.config import RunConfig
from megatron_cpt.data import (
    BlendCursor,
    IndexedDataset,
    Loader,
    PhaseBlend,
    TokenStream,
    expand_prefixes,
    validation_batches,
)
from megatron_cpt.data.loading.batch import DocumentOptions
from megatron_cpt.data.loading.fim import FillInMiddle, fill_in_middle
from megatron_cpt.data.tokenfile.disk_cache import keep_on_disk
from megatron_cpt.data.tokenfile.fingerprint import fingerprint
from megatron_cpt.model.build_model import Model, build_model
from megatron_cpt.model.capabilities import check_machine, read_machine
from megatron_cpt.optim.build_optimizer import build_optimizer, set_adam
from megatron_cpt.plan import RunPlan
from megatron_cpt.train.forward import ForwardPass
from megatron_cpt.train.metrics import LossMeter
from megatron_cpt.train.resume import init_checkpoint, load_state, preflight
from megatron_cpt.train.state import TrainState, check_progress
from megatron_cpt.train.validation import Validator

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Session:
    """A run that is ready to go on.

    Attributes:
        config, plan: what was asked for and what follows from it.
        ranks: where this process stands.
        model, optimizer, forward: the model on this rank.
        loader: this rank's batches, from the next step on.
        validator: held-out losses; None where none are asked for.
        meter: losses since the last line.
        state: where the run stands; the one thing here that changes.
        saver: writes checkpoints.
        data_fingerprints: which files the sources are, those that have left the run included.
        tokenizer_fingerprint: hash of the tokenizer's content; None: it is not known here.
        origin: the checkpoint that was loaded; None: random weights.
        is_resumed: whether the run went on from a checkpoint of its own.
    """

    config: RunConfig
    plan: RunPlan
    ranks: Ranks
    model: Model
    optimizer: MegatronOptimizer
    forward: ForwardPass
    loader: Loader
    validator: Validator | None
    meter: LossMeter
    state: TrainState
    saver: Saver
    data_fingerprints: dict[str, str]
    tokenizer_fingerprint: str | None
    origin: Path | None
    is_resumed: bool

    @property
    def output(self) -> Path:
        """The run directory."""
        return Path(self.config.output)

    @property
    def last_step(self) -> int:
        """Where this process stops: the end of the run, or `stop_at_step`."""
        return min(self.config.stop_at_step or self.plan.steps, self.plan.steps)


def setup(
    config: RunConfig,
    plan: RunPlan,
    ranks: Ranks,
    *,
    eod_id: int | None,
    tokenizer_fingerprint: str | None = None,
    allow: Collection[str] = (),
) -> Session:
    """Build the model, load what there is to load, and open the data; a collective call.

    A run directory with checkpoints goes on from its newest sound one; `init` counts for the first start only.

    Args:
        config, plan: what was asked for and what follows from it.
        ranks: where this process stands.
        eod_id: the end-of-document id; None: there is none.
        tokenizer_fingerprint: hash of the tokenizer's content; None: it is not known here.
        allow: names of changes that a resume may make.

    Raises:
        RefusedError: a checkpoint is broken or does not fit.
        UserError: the machine cannot do what is asked.
    """
    check_machine(config, read_machine())
    broken: dict[Path, list[str]] = {}
    while True:
        try:
            return _setup(config, plan, ranks, eod_id, tokenizer_fingerprint, allow, broken)
        except CorruptCheckpointError as error:
            if error.path in broken:
                raise
            broken[error.path] = error.faults
        gc.collect()  # the model that took damaged values goes before there is another one


def _setup(
    config: RunConfig,
    plan: RunPlan,
    ranks: Ranks,
    eod_id: int | None,
    tokenizer_fingerprint: str | None,
    allow: Collection[str],
    broken: Mapping[Path, Sequence[str]],
) -> Session:
    """The same, from the newest checkpoint that is not known to be broken.

    Raises:
        CorruptCheckpointError: this one is, too, as its load has shown.
    """
    seed_everything(config.seed, pipeline_rank=ranks.pipeline_rank)
    streams = {
        name: _stream(
            name,
            source.paths,
            config,
            config.span_length(name),
            fill_in_middle(name, source.fim, eod_id),
            source.cache,
        )
        for name, source in config.sources.items()
    }
    fingerprints = {name: fingerprint(stream.datasets) for name, stream in streams.items()}
    own = newest_valid(layout.checkpoints_folder(config.output), config.checkpoint.verify, broken)
    if own is not None:
        preflight(own, config, plan, ranks, fingerprints, tokenizer_fingerprint, allow)
        # those of sources that have left the run, too: they may come back
        fingerprints = own.state["data_fingerprints"] | fingerprints
    origin = own or init_checkpoint(config, broken)

    model = build_model(config)
    if ranks.is_main:
        knobs = ", ".join(sorted(model.knobs)) or "nothing fused or overlapped"
        logger.info("layers: %s; speed: %s", model.layers, knobs)
    optimizer = build_optimizer(config.optimizer, config.parallel, config.precision, model.chunks)
    state = load_state(config, ranks, model, optimizer, own, origin)
    set_adam(optimizer, config.optimizer)
    own_path = own.path if own is not None else None
    with corrupt_as_refused(own_path):
        check_progress(state, plan, str(own_path))
    counts = ranks.is_last_stage and ranks.tensor_rank == 0
    documents = DocumentOptions(
        eod_id,
        config.documents.reset_attention,
        config.documents.reset_positions,
        config.documents.eod_loss,
    )
    names = list(streams)
    return Session(
        config=config,
        plan=plan,
        ranks=ranks,
        model=model,
        optimizer=optimizer,
        forward=ForwardPass(model, len(names), config.parallel.context, ranks.device),
        loader=_loader(config, plan, ranks, streams, documents, state, own_path),
        validator=_validator(config, ranks, documents, counts),
        meter=LossMeter(names, counts),
        state=state,
        saver=Saver(
            layout.checkpoints_folder(config.output),
            model.chunks,
            optimizer,
            Retention(config.checkpoint.keep, config.checkpoint.keep_every),
            in_background=config.checkpoint.async_,
        ),
        data_fingerprints=fingerprints,
        tokenizer_fingerprint=tokenizer_fingerprint,
        origin=origin.path if origin is not None else None,
        is_resumed=own is not None,
    )


def _stream(
    name: str,
    paths: list[str],
    config: RunConfig,
    seq_length: int,
    fim: FillInMiddle | None = None,
    cache: str | None = None,
) -> TokenStream:
    datasets = [IndexedDataset(prefix) for prefix in expand_prefixes(paths)]
    if cache is not None:
        keep_on_disk(datasets, cache)
    return TokenStream(name, datasets, seq_length=seq_length, seed=config.seed, fim=fim)


def _loader(
    config: RunConfig,
    plan: RunPlan,
    ranks: Ranks,
    streams: dict[str, TokenStream],
    documents: DocumentOptions,
    state: TrainState,
    where: Path | None,
) -> Loader:
    phases = [
        PhaseBlend(phase.name, phase.first_sample, phase.num_samples, phase.weights, phase.seq_length)
        for phase in plan.phases
    ]
    grids = {name: stream.grid for name, stream in streams.items()}
    cursor = BlendCursor(phases, list(streams), limits=plan.span_limits, grids=grids)
    if state.data is not None:
        with corrupt_as_refused(where):
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
    )


def _validator(config: RunConfig, ranks: Ranks, documents: DocumentOptions, counts: bool) -> Validator | None:
    if config.validation is None:
        return None
    streams = [
        # in the run's own length, whatever that of the phases: only so can the losses be compared over the run
        _stream(name, [paths] if isinstance(paths, str) else list(paths), config, config.seq_length)
        for name, paths in config.validation.sources.items()
    ]
    batches = {
        stream.name: partial(
            validation_batches,
            stream,
            num_samples=config.validation.batches * config.batch.global_,
            micro_batch=config.batch.micro,
            data_parallel_rank=ranks.data_parallel_rank,
            data_parallel_size=ranks.data_parallel_size,
            vocab_size=config.model.vocab,
            documents=documents,
        )
        for stream in streams
    }
    group = config.batch.global_ // (config.batch.micro * ranks.data_parallel_size)
    return Validator(batches, group, counts)
