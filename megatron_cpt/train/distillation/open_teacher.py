"""The teacher of section `teacher`: found and compared before the model is built, loaded after it."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace

import orjson

from megatron_cpt.backend import Ranks, rng_state, second_layout, set_rng_state
from megatron_cpt.backend.collectives import on_all
from megatron_cpt.checkpoint.loading.find_valid import find_valid
from megatron_cpt.checkpoint.loading.load import load_weights
from megatron_cpt.checkpoint.record import SavedRun, corrupt_as_refused
from megatron_cpt.config import ModelConfig, RunConfig, TeacherConfig
from megatron_cpt.config.checks import CHECKS
from megatron_cpt.convert.dtypes import is_finite
from megatron_cpt.data import TokenStream
from megatron_cpt.data.loading.batch import DocumentOptions
from megatron_cpt.data.loading.teacher_targets import CachedTeacher
from megatron_cpt.errors import RefusedError, UserError
from megatron_cpt.files.checksum import Checksum
from megatron_cpt.model.build_model import Model, build_model
from megatron_cpt.model.padded_vocabulary import zero_padding
from megatron_cpt.planning.cost.teacher_cost import teacher_run
from megatron_cpt.train.distillation.cached_teacher import CacheTeacher
from megatron_cpt.train.distillation.distillation import Distillation
from megatron_cpt.train.distillation.distilled_loss import Teacher, VocabularyShard
from megatron_cpt.train.distillation.online_teacher import OnlineTeacher
from megatron_cpt.train.resume import compare_tokenizer

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class FoundTeacher:
    """Teacher that fits the run and is not loaded yet.

    Attributes:
        saved: its checkpoint.
        run: the run that builds its model.
        digest: hash of the checkpoint.
    """

    saved: SavedRun
    run: RunConfig
    digest: str


def find_teacher(
    config: RunConfig,
    streams: Mapping[str, TokenStream],
    documents: DocumentOptions,
    data_tokenizer: tuple[str, str] | None,
    allow: Collection[str],
) -> FoundTeacher | CachedTeacher | None:
    """Return the teacher of a run, or None if it has no section `teacher`; a collective call.

    Args:
        config: the run.
        streams: its sources.
        documents: its treatment of document boundaries.
        data_tokenizer: name and fingerprint of the tokenizer of its ids; None: unknown.
        allow: accepted differences; `tokenizer` accepts a checkpoint that was trained with another tokenizer.

    Raises:
        UserError: there is no such checkpoint, or its model cannot be divided as `parallel` says.
        RefusedError: it is corrupt, has another vocabulary or another tokenizer; or a cache does not fit the run.
    """
    section = config.teacher
    if section is None:
        return None
    if section.cache is not None:
        return CachedTeacher.open(
            section.cache,
            streams.values(),
            [name for name in config.sources if section.distills(name)],
            documents=documents,
            vocab_size=config.model.vocab,
            tokenizer=data_tokenizer,
        )
    assert config.teacher_checkpoint is not None, "checked by config/checks.py"
    saved = find_valid(config.teacher_checkpoint, config.checkpoint.verify)
    with corrupt_as_refused(saved.path):
        model = ModelConfig.model_validate(dict(saved.run["model"]))
    if model.vocab != config.model.vocab:
        raise RefusedError(
            f"teacher.from: {saved.path}: its vocabulary has {model.vocab} ids, model.vocab is {config.model.vocab}: "
            "the divergence compares equal ids; choose a teacher with the tokenizer of this run"
        )
    if section.model is not None and section.model != model:
        raise RefusedError(f"teacher.model: not the model of {saved.path}; remove it, and it is read from there")
    run = teacher_run(config, model)
    assert run is not None
    if problems := [text for check in CHECKS for text in check.find(run)]:
        raise UserError(f"teacher: its model does not fit the layout of this run: {'; '.join(problems)}")
    if "tokenizer" not in allow:
        compare_tokenizer(saved, data_tokenizer, "teacher.from")
    return FoundTeacher(saved, run, _digest(saved))


def _digest(saved: SavedRun) -> str:
    checksums = {name: entry.checksum for name, entry in saved.manifest.items()}
    return str(Checksum(orjson.dumps(checksums, option=orjson.OPT_SORT_KEYS)).hexdigest())


def open_distillation(
    config: RunConfig, ranks: Ranks, student: Model, found: FoundTeacher | CachedTeacher
) -> Distillation:
    """Build and load the teacher, unless it is a cache, and let the student's loss compare with it; a collective call.

    The random states stay unchanged, so that dropout does not depend on the teacher.

    Raises:
        RefusedError: the teacher's checkpoint is corrupt or cannot be read.
        UserError: attention takes documents in another form than the student's.
    """
    section = config.teacher
    assert section is not None
    distilled = frozenset(number for number, name in enumerate(config.sources) if section.distills(name))
    teacher: Teacher
    if isinstance(found, CachedTeacher):
        if ranks.is_main:
            logger.info(
                "teacher: the %d most likely tokens in %s, weight %g of the loss",
                found.cache.header.top_k,
                found.cache.path,
                section.weight,
            )
        teacher = CacheTeacher(found.digest, VocabularyShard.of(config.model), distilled, config.parallel.context)
    else:
        teacher = _load(config, section, ranks, student, found, distilled)
    return Distillation(teacher, student.chunks, config, ranks.device)


def _load(
    config: RunConfig,
    section: TeacherConfig,
    ranks: Ranks,
    student: Model,
    found: FoundTeacher,
    distilled: frozenset[int],
) -> Teacher:
    is_own_layout = section.layout(config.parallel) != (config.parallel.tensor, config.parallel.pipeline)
    layout = second_layout(found.run.parallel) if is_own_layout else contextlib.nullcontext
    states = rng_state()
    with layout():
        model = build_model(found.run, draw_weights=False, is_trainable=False)
        load_weights(found.saved, model.chunks, config.checkpoint.verify)
        zero_padding(model.chunks, found.run.model)
        first_row = VocabularyShard.of(found.run.model).first
    set_rng_state(states)
    on_all(lambda: _refuse_not_finite(model, found.saved))
    if config.documents.reset_attention and model.packs_documents != student.packs_documents:
        raise UserError(
            "documents.reset_attention: the layers of the teacher take documents in another form than the layers of "
            "the model; set precision.fp8=null, or reset_attention=false"
        )
    if is_own_layout and not ranks.is_last_stage:
        model = replace(model, chunks=())  # its memory is free again
    if ranks.is_main:
        logger.info("teacher: %s, forward only, weight %g of the loss", found.saved.path, section.weight)
    shard = VocabularyShard.of(config.model)
    first = shard.first - first_row
    return OnlineTeacher(
        model,
        slice(first, first + shard.columns),
        layout=layout,
        temperature=section.temperature,
        distilled=distilled,
        digest=found.digest,
    )


def _refuse_not_finite(model: Model, saved: SavedRun) -> None:
    """Raise if a weight is NaN or infinite: each loss would be, and the run would skip each update."""
    for chunk in model.chunks:
        for name, weight in chunk.named_parameters():
            if not is_finite(weight):
                raise RefusedError(
                    f"teacher.from: {saved.path}: {name}: holds weights that are not finite, so the loss would be NaN; "
                    "choose another checkpoint"
                )
