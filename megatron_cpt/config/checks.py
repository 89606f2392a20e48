"""What one field cannot know: rules between the fields of run.yaml, each with the keys that it reads."""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise

from megatron_cpt.config.schema import RunConfig


@dataclass(frozen=True)
class ConfigCheck:
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
    if not config.uses_own_batch:
        return
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


def _ramp_up(config: RunConfig) -> Iterator[str]:
    ramp, full, micro = config.batch.ramp_up, config.batch.global_, config.batch.micro
    if ramp is None:
        return
    if ramp.start >= full:
        yield f"batch.ramp_up.start: {ramp.start} is not below batch.global: {full}; there is nothing to grow"
        return
    if (full - ramp.start) % ramp.increment:
        text = f"batch.ramp_up.increment: {ramp.increment} does not lead from start: {ramp.start} to batch.global"
        yield f"{text}: {full}; choose a divisor of {full - ramp.start}"
        return
    odd = [size for size in config.batch.ramp_sizes if size % micro]
    if odd and full % micro == 0:
        text = f"batch.ramp_up: batches of {_listed(odd)} are not multiples of batch.micro: {micro}"
        yield f"{text}; choose start and increment that are"
    pipeline, virtual = config.parallel.pipeline, config.parallel.virtual_pipeline
    uneven = [size for size in config.batch.ramp_sizes if size % micro == 0 and (size // micro) % pipeline]
    if virtual > 1 and uneven:
        text = f"batch.ramp_up: batches of {_listed(uneven)} make numbers of micro-batches that parallel.pipeline: "
        yield f"{text}{pipeline} does not divide; the interleaved schedule needs multiples"


def _listed(sizes: list[int]) -> str:
    shown = ", ".join(map(str, sizes[:4]))
    return shown if len(sizes) <= 4 else f"{shown} and {len(sizes) - 4} more"


def _phase_batches(config: RunConfig) -> Iterator[str]:
    pipeline, virtual = config.parallel.pipeline, config.parallel.virtual_pipeline
    for index, phase in enumerate(config.phases):
        if phase.batch is None:
            continue
        key = f"phases[{index}].batch (phase {phase.name})"
        global_, micro = phase.batch.global_ or config.batch.global_, config.micro_batch_of(phase)
        if global_ % micro:
            yield f"{key}: micro: {micro} does not divide global: {global_}; choose a divisor of it"
        elif virtual > 1 and (global_ // micro) % pipeline:
            text = f"{key}: global: {global_} makes {global_ // micro} micro-batches, which parallel.pipeline: "
            yield f"{text}{pipeline} does not divide; the interleaved schedule needs a multiple"


def _lengths_by_key(config: RunConfig) -> dict[str, int]:
    """Every sequence length of the run, by the key that gives it."""
    own = {
        f"phases[{index}].seq_length (phase {phase.name})": phase.seq_length
        for index, phase in enumerate(config.phases)
        if phase.seq_length is not None
    }
    return {"seq_length": config.seq_length, **own}


def _sequence(config: RunConfig) -> Iterator[str]:
    parallel = config.parallel
    for key, length in _lengths_by_key(config).items():
        # tensor-parallel ranks share out what a context-parallel rank has of the sequence
        shards, names = parallel.tensor * parallel.context, "parallel.tensor"
        names += " x parallel.context" if parallel.context > 1 else ""
        if parallel.sequence and parallel.tensor > 1 and length % shards:
            yield f"{key}: {length} is not divisible by {names}: {shards}, as parallel.sequence needs"
        if parallel.context > 1 and length % (2 * parallel.context):
            yield f"{key}: {length} is not divisible by 2 x parallel.context: {parallel.context}"


def _phase_lengths(config: RunConfig) -> Iterator[str]:
    """Every length divides the next one, so that a chunk of the longest is cut into samples of any of the others."""
    lengths = sorted({config.length_of(phase) for phase in config.phases})
    for shorter, longer in pairwise(lengths):
        if longer % shorter:
            names = [phase.name for phase in config.phases if config.length_of(phase) == longer]
            text = f"phases[*].seq_length: {longer} (phase {', '.join(names)}) is not a multiple of {shorter}"
            yield f"{text}; lengths that change within a run must divide each other"


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
    if documents.reset_attention and config.parallel.context > 1:
        text = f"documents.reset_attention: not with parallel.context: {config.parallel.context}"
        yield f"{text}, which cuts documents apart at places of the sample; leave one of them out"
    if documents.eod_id is not None and documents.eod_id >= config.model.vocab:
        yield f"documents.eod_id: {documents.eod_id} is outside model.vocab: {config.model.vocab}"


def _fp4(config: RunConfig) -> Iterator[str]:
    precision, fp4 = config.precision, config.precision.fp4
    if fp4 is None:
        return
    if precision.fp8 is not None:
        yield "precision.fp4: not beside precision.fp8; leave one of them out"
    if precision.compute != "bf16":
        yield "precision.fp4: needs precision.compute: bf16"
    if 2 * fp4.first_last_bf16 >= config.model.layers:
        text = f"precision.fp4.first_last_bf16: {fp4.first_last_bf16} at each end leave none of model.layers"
        yield f"{text}: {config.model.layers} in FP4; choose fewer"


def _fp8_params(config: RunConfig) -> Iterator[str]:
    fp8, key = config.precision.fp8, "precision.fp8.params"
    if fp8 is None or not fp8.params:
        return
    if fp8.backend == "emulated":
        yield f"{key}: the emulated backend keeps its weights in precision.compute; leave it out"
    if not config.parallel.distributed_optimizer:
        yield f"{key}: needs parallel.distributed_optimizer: true, which holds the fp32 master weights"
    if config.model.gated:
        yield f"{key}: a gated MLP's first weight is saved as two halves, which an FP8 tensor cannot be cut into"


def _quantized_shapes(config: RunConfig) -> Iterator[str]:
    """What Transformer Engine asserts of operands in the first step: rows by 8 and columns by 16, or blocks of 32."""
    precision, model, parallel = config.precision, config.model, config.parallel
    if not precision.uses_transformer_engine:
        return
    in_blocks = precision.fp4 is not None or (precision.fp8 is not None and precision.fp8.recipe == "mxfp8")
    rows, columns = (32, 32) if in_blocks else (8, 16)
    key = "precision.fp4" if precision.fp4 is not None else "precision.fp8"
    widths = {"model.hidden": model.hidden, "model.ffn_hidden / parallel.tensor": model.ffn_hidden // parallel.tensor}
    if model.head_dim is not None or model.hidden % model.heads == 0:
        widths["heads x head_dim / parallel.tensor"] = model.heads * model.head_size // parallel.tensor
    for name, width in widths.items():
        if width % columns:
            yield f"{key}: {name} is {width}, and must be a multiple of {columns}"
    micro_batches = {
        f"phases[{index}] (phase {phase.name})": config.micro_batch_of(phase) * config.length_of(phase)
        for index, phase in enumerate(config.phases)
    }
    if config.validation is not None:
        micro_batches["validation (batch.micro x seq_length)"] = config.batch.micro * config.seq_length
    for name, tokens in micro_batches.items():
        if tokens // parallel.context % rows:
            text = f"{key}: {name}: a micro-batch has {tokens // parallel.context} tokens a rank"
            yield f"{text}, and must have a multiple of {rows}"


def _precision(config: RunConfig) -> Iterator[str]:
    fp8 = config.precision.fp8
    if fp8 is None:
        return
    if config.precision.compute != "bf16" and fp8.backend != "emulated":
        yield "precision.fp8: needs precision.compute: bf16"
    if fp8.backend == "emulated" and fp8.recipe not in ("delayed", "tensorwise"):
        yield f"precision.fp8.recipe: {fp8.recipe} is not emulated; choose delayed or tensorwise"
    if fp8.first_last_bf16 and fp8.recipe == "delayed":
        yield "precision.fp8.first_last_bf16: megatron-core refuses it with recipe delayed; choose another recipe or 0"
    if 2 * fp8.first_last_bf16 >= config.model.layers:
        text = f"precision.fp8.first_last_bf16: {fp8.first_last_bf16} at each end leave none of model.layers"
        yield f"{text}: {config.model.layers} in FP8; choose fewer"


def _spike(config: RunConfig) -> Iterator[str]:
    spike = config.resilience.spike
    if spike.num_needed > spike.window:
        text = f"resilience.spike.warmup: {spike.num_needed} losses never fit into the window: {spike.window}"
        yield f"{text}; choose at most that many"


_HEADS = ("model.heads", "model.kv_groups", "model.hidden", "model.head_dim", "model.rotary_percent", "parallel.tensor")
_PIPELINE = ("parallel.pipeline", "parallel.virtual_pipeline")

CHECKS = (
    ConfigCheck(_HEADS, _heads),
    ConfigCheck(_HEADS, _rotary),
    ConfigCheck(("model.ffn_hidden", "model.vocab", "model.vocab_multiple", "parallel.tensor"), _widths),
    ConfigCheck(("model.layers", *_PIPELINE), _pipeline),
    ConfigCheck(("batch.global", "batch.micro", "phases[*].batch", "validation", *_PIPELINE), _micro_batches),
    ConfigCheck(("batch.global", "batch.micro", "batch.ramp_up", *_PIPELINE), _ramp_up),
    ConfigCheck(("batch.global", "batch.micro", "phases[*].batch", *_PIPELINE), _phase_batches),
    ConfigCheck(
        ("seq_length", "phases[*].seq_length", "parallel.tensor", "parallel.context", "parallel.sequence"), _sequence
    ),
    ConfigCheck(("seq_length", "phases[*].seq_length"), _phase_lengths),
    ConfigCheck(("schedule.max_lr", "schedule.min_lr"), _rates),
    ConfigCheck(("phases[*].blend", "sources"), _blends),
    ConfigCheck(("sources",), _exhausted),
    ConfigCheck(("sources", "documents.eod_id", "tokenizer", "model.vocab"), _fim),
    ConfigCheck(("phases[*].until", "phases[*].name"), _phase_ends),
    ConfigCheck(("documents.eod_id", "tokenizer", "model.vocab", "parallel.context"), _documents),
    ConfigCheck(("precision.compute", "precision.fp8", "model.layers"), _precision),
    ConfigCheck(("precision.compute", "precision.fp8", "precision.fp4", "model.layers"), _fp4),
    ConfigCheck(("precision.fp8", "parallel.distributed_optimizer", "model.gated"), _fp8_params),
    ConfigCheck(
        (*_HEADS, "precision", "model.ffn_hidden", "parallel", "batch", "seq_length", "phases", "validation"),
        _quantized_shapes,
    ),
    ConfigCheck(("resilience.spike.warmup", "resilience.spike.window"), _spike),
)
