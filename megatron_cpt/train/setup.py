"""A prepared run -> everything that training needs, as one named result."""

from __future__ import annotations

import logging
from collections.abc import Collection
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from megatron.core.optimizer import MegatronOptimizer

from megatron_cpt.backend import Ranks, seed_everything
from megatron_cpt.checkpoint import layout
from megatron_cpt.checkpoint.load import find_sound, load_training, load_weights, newest_sound, read_run, read_state
from megatron_cpt.checkpoint.preflight import find_changes, model_shape, refuse_unless_allowed
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
from megatron_cpt.data.batch import DocumentOptions
from megatron_cpt.data.fim import FillInMiddle, fill_in_middle
from megatron_cpt.data.fingerprint import fingerprint
from megatron_cpt.errors import RefusedError
from megatron_cpt.model.build import Model, build_model
from megatron_cpt.optim.build import build_optimizer
from megatron_cpt.plan import RunPlan
from megatron_cpt.train.forward import ForwardPass
from megatron_cpt.train.metrics import LossMeter
from megatron_cpt.train.state import TrainState
from megatron_cpt.train.validate import Validator

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
        data_fingerprints: which files the sources are.
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
    data_fingerprints: dict[str, str]
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
    config: RunConfig, plan: RunPlan, ranks: Ranks, *, eod_id: int | None, allow: Collection[str] = ()
) -> Session:
    """Build the model, load what there is to load, and open the data; a collective call.

    A run directory with checkpoints goes on from its newest sound one; `init` counts for the first start only.

    Raises:
        RefusedError: a checkpoint is broken or does not fit.
        UserError: the machine cannot do what is asked.
    """
    seed_everything(config.seed, pipeline_rank=ranks.pipeline_rank)
    streams = {
        name: _stream(name, source.paths, config, fill_in_middle(name, source.fim, eod_id))
        for name, source in config.sources.items()
    }
    fingerprints = {name: fingerprint(stream.datasets) for name, stream in streams.items()}
    own = newest_sound(layout.checkpoints_folder(config.output))
    if own is not None:
        changes = find_changes(read_run(own), config, read_state(own)["data_fingerprints"], fingerprints)
        refuse_unless_allowed(changes, allow, str(own))
        for change in changes:
            _log(ranks, f"allowed: {change}")
    origin = own or _init_checkpoint(config)

    model = build_model(config)
    optimizer = build_optimizer(config.optimizer, config.parallel, config.precision, model.chunks)
    state = _load(config, ranks, model, optimizer, own, origin)
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
        forward=ForwardPass(
            model, len(names), config.seq_length, config.batch.micro, config.parallel.context, ranks.device
        ),
        loader=_loader(config, plan, ranks, streams, documents, state),
        validator=_validator(config, ranks, documents, counts),
        meter=LossMeter(names, counts),
        state=state,
        data_fingerprints=fingerprints,
        origin=origin,
        is_resumed=own is not None,
    )


def _stream(name: str, paths: list[str], config: RunConfig, fim: FillInMiddle | None = None) -> TokenStream:
    datasets = [IndexedDataset(prefix) for prefix in expand_prefixes(paths)]
    return TokenStream(name, datasets, seq_length=config.seq_length, seed=config.seed, fim=fim)


def _init_checkpoint(config: RunConfig) -> Path | None:
    if config.init.from_ is None:
        return None
    path = find_sound(config.init.from_)
    before, now = model_shape(read_run(path)), model_shape(config.to_dict())
    wrong = [f"{key}: {before.get(key)} there, {now.get(key)} here" for key in now if before.get(key) != now[key]]
    if wrong:
        raise RefusedError(
            f"init.from: {path}: a checkpoint of another model: {'; '.join(wrong)}; make the model section agree"
        )
    return path


def _load(
    config: RunConfig, ranks: Ranks, model: Model, optimizer: MegatronOptimizer, own: Path | None, origin: Path | None
) -> TrainState:
    if own is not None:
        saved = read_state(own)
        load_training(own, model.chunks, optimizer, with_rng=saved["layout"] == rank_layout(config, ranks))
        _log(ranks, f"going on from {own}: step {saved['train']['step']}")
        return TrainState.from_dict(saved["train"])
    if origin is not None:
        if config.init.load == "weights":
            load_weights(origin, model.chunks)
            optimizer.reload_model_params()  # the fp32 master weights were copied from the random ones
        else:
            load_training(origin, model.chunks, optimizer, with_rng=False)
        _log(ranks, f"starting from {origin}: {config.init.load}; step, data and schedule are new")
    return TrainState()


def rank_layout(config: RunConfig, ranks: Ranks) -> dict[str, int]:
    """What must be the same for random states to belong to the same ranks."""
    parallel = config.parallel
    return {
        "world_size": ranks.world_size,
        "tensor": parallel.tensor,
        "pipeline": parallel.pipeline,
        "virtual_pipeline": parallel.virtual_pipeline,
        "context": parallel.context,
    }


def _loader(
    config: RunConfig,
    plan: RunPlan,
    ranks: Ranks,
    streams: dict[str, TokenStream],
    documents: DocumentOptions,
    state: TrainState,
) -> Loader:
    batch = config.batch.global_
    phases = [
        PhaseBlend(
            phase.name,
            (phase.first_step - 1) * batch,
            (phase.last_step - phase.first_step + 1) * batch,
            phase.weights,
        )
        for phase in plan.phases
    ]
    cursor = BlendCursor(phases, list(streams), limits=plan.sample_limits)
    if state.data is not None:
        cursor.load_state_dict(state.data)
    return Loader(
        list(streams.values()),
        cursor,
        global_batch=batch,
        micro_batch=config.batch.micro,
        data_parallel_rank=ranks.data_parallel_rank,
        data_parallel_size=ranks.data_parallel_size,
        vocab_size=config.model.vocab,
        documents=documents,
    )


def _validator(config: RunConfig, ranks: Ranks, documents: DocumentOptions, counts: bool) -> Validator | None:
    if config.validation is None:
        return None
    streams = [
        _stream(name, [paths] if isinstance(paths, str) else list(paths), config)
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


def _log(ranks: Ranks, message: str) -> None:
    if ranks.is_main:
        logger.info(message)
