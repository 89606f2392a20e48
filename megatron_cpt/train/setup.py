"""Setup of a prepared run: checkpoint, model, optimizer and data, as one session."""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path

from megatron.core.optimizer import MegatronOptimizer

from megatron_cpt.backend import Ranks, seed_everything
from megatron_cpt.backend.collectives import on_main
from megatron_cpt.checkpoint import layout
from megatron_cpt.checkpoint.loading.find_valid import newest_valid
from megatron_cpt.checkpoint.manifest import CorruptCheckpointError
from megatron_cpt.checkpoint.preflight import DATA
from megatron_cpt.checkpoint.record import SavedRun, corrupt_as_refused
from megatron_cpt.checkpoint.saving.publish import Retention
from megatron_cpt.checkpoint.saving.saver import Saver
from megatron_cpt.config import RunConfig
from megatron_cpt.data import Loader, TokenStream
from megatron_cpt.data.loading.batch import DocumentOptions
from megatron_cpt.data.loading.teacher_targets import CachedTeacher
from megatron_cpt.data.tokenfile.fingerprint import fingerprint
from megatron_cpt.model.build_model import Model, build_model
from megatron_cpt.model.capabilities import check_machine, read_machine
from megatron_cpt.optim.build_optimizer import build_optimizer, set_adam
from megatron_cpt.optim.ema import WeightEma
from megatron_cpt.optim.update import Update
from megatron_cpt.planning import RunPlan, flops_per_token
from megatron_cpt.planning.hardware import emulates_bf16
from megatron_cpt.provenance.plans_file import read_started_run
from megatron_cpt.train.device_batch import make_upload
from megatron_cpt.train.distillation.open_teacher import find_teacher, open_distillation
from megatron_cpt.train.first_start import choose_run_id, refuse_lost_run
from megatron_cpt.train.forward import ForwardPass
from megatron_cpt.train.metrics import LossMeter
from megatron_cpt.train.open_data import (
    build_loader,
    build_validator,
    document_options,
    open_streams,
    verify_touched_data,
)
from megatron_cpt.train.resume import compare_tokenizer, init_checkpoint, load_state, preflight
from megatron_cpt.train.state import TrainState, check_progress
from megatron_cpt.train.validation import Validator

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Session:
    """A run that is ready to train.

    Attributes:
        model, optimizer: of this rank.
        ema: moving average of its weights; None without an `ema` section.
        forward, update: the two halves of a step.
        loader: this rank's batches, from the next step on.
        validator: measures held-out losses; None without a `validation` section.
        meter: sums since the last line of metrics.
        state: progress of the run; changes with every step.
        data_fingerprints: hashes of the files of all sources, including sources that have left the run.
        tokenizer_fingerprint: hash of the tokenizer's content; None: unknown.
        eod_id: the end-of-document id; None: there is none.
        run_id: made at the first start of the run; all its checkpoints have it.
        origin: the checkpoint that was loaded; None: random weights.
        is_resumed: whether `origin` is the run's own checkpoint.
    """

    config: RunConfig
    plan: RunPlan
    ranks: Ranks
    model: Model
    optimizer: MegatronOptimizer
    ema: WeightEma | None
    forward: ForwardPass
    update: Update
    loader: Loader
    validator: Validator | None
    meter: LossMeter
    state: TrainState
    saver: Saver
    data_fingerprints: dict[str, str]
    tokenizer_fingerprint: str | None
    eod_id: int | None
    run_id: str
    origin: Path | None
    is_resumed: bool

    @property
    def output(self) -> Path:
        """The run directory."""
        return Path(self.config.output)

    @property
    def last_step(self) -> int:
        """Step at which this process stops: the end of the run, or `stop_at_step`."""
        return min(self.config.stop_at_step or self.plan.steps, self.plan.steps)

    @property
    def saves_at_last_step(self) -> bool:
        """False if `checkpoint.at_end` is off and the process stops at the end of the run, not at `stop_at_step`."""
        return self.config.checkpoint.at_end or self.last_step == self.config.stop_at_step

    def flops_per_token(self, step: int) -> float:
        """Return the model FLOPs of training on one token of a step, full attention counted."""
        return flops_per_token(self.config.model, self.plan.segment_of(step).seq_length).full


def setup(
    config: RunConfig,
    plan: RunPlan,
    ranks: Ranks,
    *,
    eod_id: int | None,
    tokenizer_fingerprint: str | None = None,
    data_tokenizer: tuple[str, str] | None = None,
    allow: Collection[str] = (),
    restart: bool = False,
    note: Callable[[str], None] = lambda activity: None,
) -> Session:
    """Open the data, find the checkpoint to start from, and build and load the model; a collective call.

    A run directory with checkpoints resumes from the newest valid one; `init` counts for the first start only. The
    checksums of shards are compared while the model loads. If a shard turns out corrupt, the model is built a second
    time and loaded from the previous checkpoint.

    Args:
        config, plan, ranks: the run.yaml, its plan, and this process's place in the job.
        eod_id: the end-of-document id; None: there is none.
        tokenizer_fingerprint: hash of the tokenizer's content; None: unknown.
        data_tokenizer: name and fingerprint of the tokenizer of the run's ids, as in `PreparedRun`.
        allow: names of the changes that a resume may make.
        restart: start from scratch where a run has lost its checkpoints.
        note: called during long work, with its name.

    Raises:
        RefusedError: a checkpoint is corrupt or does not fit, or the run has lost its checkpoints.
        UserError: this machine cannot run what the run.yaml asks for.
    """
    config = check_machine(config, read_machine())
    if ranks.is_main:
        _warn_of_emulated_bf16(config, ranks)
    streams = open_streams(config, eod_id)
    fingerprints = {name: fingerprint(stream.datasets, with_times=True) for name, stream in streams.items()}

    started = on_main(lambda: read_started_run(Path(config.output)))
    documents = document_options(config, eod_id)
    teacher = find_teacher(config, streams, documents, data_tokenizer, allow)
    teacher_digest = teacher.digest if teacher is not None else None

    def check_resume(own: SavedRun | None) -> None:
        if own is not None:
            run_id = started.run_id if started is not None else None
            facts = (fingerprints, tokenizer_fingerprint, eod_id, run_id, teacher_digest)
            preflight(own, config, plan, ranks, *facts, allow)
            if DATA.name not in allow:
                verify_touched_data(own.state["data_fingerprints"], fingerprints, streams, note)
        elif not restart:
            on_main(lambda: refuse_lost_run(Path(config.output)))

    def check_init(origin: SavedRun) -> None:
        if "tokenizer" not in allow:
            compare_tokenizer(origin, data_tokenizer)

    own, origin, model, optimizer, ema, state = _build_from_newest_valid(config, ranks, check_resume, check_init)
    if own is not None:
        with corrupt_as_refused(own.path):
            check_progress(state, plan, str(own.path))
    distillation = open_distillation(config, ranks, model, teacher) if teacher is not None else None
    names, contributes_loss = list(streams), ranks.is_last_stage and ranks.tensor_rank == 0
    loader, validator = _open_loaders(
        config,
        plan,
        ranks,
        streams,
        documents=documents,
        teacher=teacher if isinstance(teacher, CachedTeacher) and ranks.is_last_stage else None,
        model=model,
        state=state,
        saved=own,
        measures_loss=contributes_loss,
    )
    return Session(
        config=config,
        plan=plan,
        ranks=ranks,
        model=model,
        optimizer=optimizer,
        ema=ema,
        forward=ForwardPass(model, len(names), config.parallel.context, ranks.device, distillation),
        update=Update(optimizer, config.optimizer.weight_decay),
        loader=loader,
        validator=validator,
        meter=LossMeter(names, contributes_loss, config.teacher),
        state=state,
        saver=_open_saver(config, model, optimizer, ema),
        data_fingerprints=fingerprints if own is None else own.state["data_fingerprints"] | fingerprints,
        tokenizer_fingerprint=tokenizer_fingerprint,
        eod_id=eod_id,
        run_id=choose_run_id(own, None if restart else started),
        origin=origin.path if origin is not None else None,
        is_resumed=own is not None,
    )


def _open_loaders(
    config: RunConfig,
    plan: RunPlan,
    ranks: Ranks,
    streams: dict[str, TokenStream],
    *,
    documents: DocumentOptions,
    teacher: CachedTeacher | None,
    model: Model,
    state: TrainState,
    saved: SavedRun | None,
    measures_loss: bool,
) -> tuple[Loader, Validator | None]:
    """Open the loader from the next step on, and the validator; each uploads in a thread of its own."""
    uploads = [make_upload(ranks.device, packs_documents=model.packs_documents) for _ in range(2)]
    path = saved.path if saved is not None else None
    return (
        build_loader(config, plan, ranks, streams, documents, state, path, uploads[0], teacher),
        build_validator(config, ranks, documents, uploads[1], measures_loss),
    )


def _open_saver(config: RunConfig, model: Model, optimizer: MegatronOptimizer, ema: WeightEma | None) -> Saver:
    return Saver(
        layout.checkpoints_folder(config.output),
        model.chunks,
        optimizer,
        Retention(config.checkpoint.keep, config.checkpoint.keep_every),
        ema=ema,
        in_background=config.checkpoint.async_,
    )


def _warn_of_emulated_bf16(config: RunConfig, ranks: Ranks) -> None:
    if ranks.device.type == "cpu" and config.precision.compute == "bf16" and emulates_bf16():
        logger.warning(
            "precision.compute: bf16 is emulated on this CPU and several times slower than fp32; to train here, set "
            "precision.compute=fp32"
        )


def _build_from_newest_valid(
    config: RunConfig,
    ranks: Ranks,
    check_resume: Callable[[SavedRun | None], None],
    check_init: Callable[[SavedRun], None],
) -> tuple[SavedRun | None, SavedRun | None, Model, MegatronOptimizer, WeightEma | None, TrainState]:
    """Find the checkpoint to start from, build the model and load it; a collective call.

    Returns:
        The run's own checkpoint (None: the run starts), the checkpoint that was loaded (None: random weights), the
        model, its optimizer, the moving average of its weights and the progress of the run.
    """
    corrupt: dict[Path, list[str]] = {}
    while True:
        own = newest_valid(layout.checkpoints_folder(config.output), config.checkpoint.verify, corrupt)
        check_resume(own)
        origin = own or init_checkpoint(config, corrupt)
        if own is None and origin is not None:
            check_init(origin)
        try:
            return own, origin, *_build_and_load(config, ranks, own, origin)
        except CorruptCheckpointError as error:
            if error.path in corrupt:
                raise
            corrupt[error.path] = error.faults
        gc.collect()  # free the model with the corrupt values before another one is built


def _build_and_load(
    config: RunConfig, ranks: Ranks, own: SavedRun | None, origin: SavedRun | None
) -> tuple[Model, MegatronOptimizer, WeightEma | None, TrainState]:
    """Build the model, its optimizer and the average of its weights, and load them; a collective call.

    Args:
        config, ranks: the run.
        own, origin: as in `load_state`.

    Raises:
        CorruptCheckpointError: shards of the checkpoint are corrupt.
    """
    seed_everything(config.seed, pipeline_rank=ranks.pipeline_rank)
    model = build_model(config, draw_weights=origin is None)
    if ranks.is_main:
        knobs = ", ".join(sorted(model.knobs)) or "nothing fused or overlapped"
        logger.info("layers: %s; speed: %s", model.layers, knobs)
    optimizer = build_optimizer(config.optimizer, config.schedule, config.parallel, config.precision, model.chunks)
    ema = WeightEma(config.ema, model.chunks, optimizer) if config.ema is not None else None
    state = load_state(config, ranks, model, optimizer, ema, own, origin)
    set_adam(optimizer, config.optimizer)
    return model, optimizer, ema, state
