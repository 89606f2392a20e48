"""What one field cannot know: rules between the fields of run.yaml, each with the keys that it reads."""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from megatron_cpt.config.schema import RunConfig


@dataclass(frozen=True)
class Check:
    """A rule; it is left out where one of its keys (or what holds it) already has a problem of its own."""

    keys: tuple[str, ...]
    find: Callable[[RunConfig], Iterator[str]]


def _heads(config: RunConfig) -> Iterator[str]:
    model, tensor = config.model, config.parallel.tensor
    if model.heads % model.num_kv_groups:
        yield f"model.kv_groups: {model.num_kv_groups} does not divide model.heads: {model.heads}; choose a divisor"
    if model.head_dim is None and model.hidden % model.heads:
        text = f"model.heads: {model.heads} does not divide model.hidden: {model.hidden}"
        yield f"{text}; choose a divisor or set model.head_dim"
    if model.heads % tensor:
        yield f"parallel.tensor: {tensor} does not divide model.heads: {model.heads}; choose a divisor of it"
    elif model.num_kv_groups % tensor:
        text = f"parallel.tensor: {tensor} does not divide model.kv_groups: {model.num_kv_groups}"
        yield f"{text}; choose a divisor of it: no tensor rank may be without a key/value group"


def _rotary(config: RunConfig) -> Iterator[str]:
    model = config.model
    if model.head_dim is None and model.hidden % model.heads:
        return  # the heads have no size yet
    rotary = model.head_size * model.rotary_percent
    if abs(rotary - 2 * round(rotary / 2)) > 1e-6:
        text = f"model.rotary_percent: {model.rotary_percent:g} of a head of {model.head_size} is {rotary:g}"
        yield f"{text}; RoPE turns pairs: it must come to an even number"


def _widths(config: RunConfig) -> Iterator[str]:
    tensor, ffn_hidden = config.parallel.tensor, config.model.ffn_hidden
    if ffn_hidden % tensor:
        yield f"parallel.tensor: {tensor} does not divide model.ffn_hidden: {ffn_hidden}; choose a divisor of it"
    if config.model.padded_vocab % tensor:
        yield (
            f"parallel.tensor: {tensor} does not divide the padded vocabulary {config.model.padded_vocab}; "
            "set model.vocab_multiple to a multiple of it"
        )


def _pipeline(config: RunConfig) -> Iterator[str]:
    pipeline, virtual, layers = config.parallel.pipeline, config.parallel.virtual_pipeline, config.model.layers
    if layers % (pipeline * virtual):
        stages = f"{pipeline}" if virtual == 1 else f"{pipeline} x parallel.virtual_pipeline: {virtual}"
        yield f"parallel.pipeline: {stages} does not divide model.layers: {layers}; every chunk needs as many layers"
    if virtual > 1 and pipeline == 1:
        yield f"parallel.virtual_pipeline: {virtual} needs parallel.pipeline above 1; set it to 1"


def _micro_batches(config: RunConfig) -> Iterator[str]:
    global_, micro = config.batch.global_, config.batch.micro
    if global_ % micro:
        yield f"batch.micro: {micro} does not divide batch.global: {global_}; choose a divisor of it"
        return
    pipeline, virtual = config.parallel.pipeline, config.parallel.virtual_pipeline
    if virtual > 1 and (global_ // micro) % pipeline:
        yield (
            f"batch.global: {global_} makes {global_ // micro} micro-batches, which parallel.pipeline: {pipeline} does "
            "not divide; the interleaved schedule needs a multiple"
        )


def _sequence(config: RunConfig) -> Iterator[str]:
    parallel, length = config.parallel, config.seq_length
    if parallel.sequence and length % parallel.tensor:
        yield f"seq_length: {length} is not divisible by parallel.tensor: {parallel.tensor}, as parallel.sequence needs"
    if parallel.context > 1 and length % (2 * parallel.context):
        yield f"seq_length: {length} is not divisible by 2 x parallel.context: {parallel.context}"


def _rates(config: RunConfig) -> Iterator[str]:
    schedule = config.schedule
    if schedule.min_lr > schedule.max_lr:
        yield f"schedule.min_lr: {schedule.min_lr:g} is above schedule.max_lr: {schedule.max_lr:g}; swap them"


def _blends(config: RunConfig) -> Iterator[str]:
    for index, phase in enumerate(config.phases):
        for name, weight in phase.blend.items():
            key = f"phases[{index}].blend.{name} (phase {phase.name})"
            if name not in config.sources:
                near = difflib.get_close_matches(name, list(config.sources), n=1)
                hint = f"did you mean {near[0]}?" if near else f"known sources: {', '.join(config.sources)}"
                yield f"{key}: names no source; {hint}"
            if not math.isfinite(weight) or weight <= 0:
                yield f"{key}: {weight:g} is not a positive weight; leave the source out to give it none"


def _exhausted(config: RunConfig) -> Iterator[str]:
    for name, source in config.sources.items():
        if source.on_exhausted == "renormalize" and source.max_epochs is None:
            yield f"sources.{name}.on_exhausted: renormalize: needs max_epochs, which says when the source has ended"


def _fim(config: RunConfig) -> Iterator[str]:
    for name, source in config.sources.items():
        fim, key = source.fim, f"sources.{name}.fim"
        if fim is None:
            continue
        if config.tokenizer is None and config.documents.eod_id is None:
            yield f"{key}: needs the end-of-document id; set tokenizer: KIND:PATH or documents.eod_id"
        ids = {"prefix_id": fim.prefix_id, "middle_id": fim.middle_id, "suffix_id": fim.suffix_id}
        for id_name, value in ids.items():
            if value >= config.model.vocab:
                yield f"{key}.{id_name}: {value} is outside model.vocab: {config.model.vocab}"
        if len({*ids.values(), config.documents.eod_id}) < 4:
            yield f"{key}: prefix_id, middle_id, suffix_id and the end-of-document id must be four different tokens"


def _phase_ends(config: RunConfig) -> Iterator[str]:
    names = [phase.name for phase in config.phases]
    for name in sorted({name for name in names if names.count(name) > 1}):
        yield f"phases: two phases have the name {name}; names tell them apart in metrics and plans"
    for index, phase in enumerate(config.phases):
        key = f"phases[{index}].until (phase {phase.name})"
        last = index == len(config.phases) - 1
        if not last and phase.until is None:
            way_out = "{lr: 0.2}, {tokens: 250B} or {step: 1000}"
            yield f"{key}: missing; every phase but the last says where it ends: {way_out}"
        if last and phase.until is not None:
            yield f"{key}: the last phase runs to the end of the run; leave until out"


def _documents(config: RunConfig) -> Iterator[str]:
    documents = config.documents
    wanted = [k for k in ("reset_attention", "reset_positions") if getattr(documents, k)]
    wanted += [] if documents.eod_loss else ["eod_loss: false"]
    if wanted and documents.eod_id is None and config.tokenizer is None:
        yield f"documents.{wanted[0]}: needs the end-of-document id; set tokenizer: KIND:PATH or documents.eod_id"
    if documents.eod_id is not None and documents.eod_id >= config.model.vocab:
        yield f"documents.eod_id: {documents.eod_id} is outside model.vocab: {config.model.vocab}"


def _precision(config: RunConfig) -> Iterator[str]:
    if config.precision.fp8 is not None and config.precision.compute != "bf16":
        yield "precision.fp8: needs precision.compute: bf16"


_HEADS = ("model.heads", "model.kv_groups", "model.hidden", "model.head_dim", "model.rotary_percent", "parallel.tensor")
_PIPELINE = ("parallel.pipeline", "parallel.virtual_pipeline")

CHECKS = (
    Check(_HEADS, _heads),
    Check(_HEADS, _rotary),
    Check(("model.ffn_hidden", "model.vocab", "model.vocab_multiple", "parallel.tensor"), _widths),
    Check(("model.layers", *_PIPELINE), _pipeline),
    Check(("batch.global", "batch.micro", *_PIPELINE), _micro_batches),
    Check(("seq_length", "parallel.tensor", "parallel.context", "parallel.sequence"), _sequence),
    Check(("schedule.max_lr", "schedule.min_lr"), _rates),
    Check(("phases[*].blend", "sources"), _blends),
    Check(("sources",), _exhausted),
    Check(("sources", "documents.eod_id", "tokenizer", "model.vocab"), _fim),
    Check(("phases[*].until", "phases[*].name"), _phase_ends),
    Check(("documents.eod_id", "tokenizer", "model.vocab"), _documents),
    Check(("precision.compute", "precision.fp8"), _precision),
)
