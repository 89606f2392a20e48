"""Rules between the fields of run.yaml, each with the keys that it reads."""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise

from megatron_cpt.config.precision_checks import (
    check_fp8_weights,
    check_moments,
    check_precision,
    check_quantized_shapes,
)
from megatron_cpt.config.schema import RunConfig, TeacherConfig


@dataclass(frozen=True)
class ConfigCheck:
    """One rule. It is skipped if one of its keys, or a section that holds one, already has a problem of its own.

    Attributes:
        keys: dotted keys that the rule reads; `[*]` stands for any entry of a list.
        find: yields one message per problem.
    """

    keys: tuple[str, ...]
    find: Callable[[RunConfig], Iterator[str]]


def _check_divides(part: str, size: int, whole: str, total: int, advice: str = "choose a divisor") -> Iterator[str]:
    if total % size:
        yield f"{part}: {size} does not divide {whole}: {total}; {advice}"


def _check_heads(config: RunConfig) -> Iterator[str]:
    model, tensor = config.model, config.parallel.tensor
    heads, groups = ("model.heads", model.heads), ("model.kv_groups", model.num_kv_groups)
    yield from _check_divides(*groups, *heads, "every group serves the same number of heads: choose a divisor")
    if model.head_dim is None:
        yield from _check_divides(*heads, "model.hidden", model.hidden, "choose a divisor or set model.head_dim")
    yield from _check_divides("parallel.tensor", tensor, *heads)
    if model.heads % tensor == 0:
        advice = "every tensor-parallel rank needs a key/value group: choose a divisor"
        yield from _check_divides("parallel.tensor", tensor, *groups, advice)


def _check_rotary_size(config: RunConfig) -> Iterator[str]:
    model = config.model
    if model.head_dim is None and model.hidden % model.heads:
        return  # the size of a head is unknown
    rotary = model.head_size * model.rotary_percent
    if abs(rotary - 2 * round(rotary / 2)) > 1e-6:
        yield (
            f"model.rotary_percent: {model.rotary_percent:g} of a head of {model.head_size} is {rotary:g}; RoPE "
            "rotates pairs, so choose a share that gives an even number"
        )


def _check_widths(config: RunConfig) -> Iterator[str]:
    tensor, vocab = config.parallel.tensor, config.model.padded_vocab
    yield from _check_divides("parallel.tensor", tensor, "model.ffn_hidden", config.model.ffn_hidden)
    advice = f"set model.vocab_multiple to a multiple of {tensor}"
    yield from _check_divides("parallel.tensor", tensor, "the padded size of model.vocab", vocab, advice)


def _check_pipeline(config: RunConfig) -> Iterator[str]:
    pipeline, virtual, layers = config.parallel.pipeline, config.parallel.virtual_pipeline, config.model.layers
    if virtual > 1 and pipeline == 1:
        yield f"parallel.virtual_pipeline: {virtual} needs parallel.pipeline above 1; set it to 1"
        return
    chunks = f"parallel.pipeline: {pipeline}" + (f" x parallel.virtual_pipeline: {virtual}" if virtual > 1 else "")
    if config.parallel.pipeline_layout is not None:
        yield from _check_pipeline_layout(config.parallel.pipeline_layout, chunks, pipeline * virtual, layers)
    elif layers % (pipeline * virtual):
        advice = "choose a divisor"
        if pipeline * virtual <= min(layers, MAX_SHOWN_CHUNKS):
            even, rest = divmod(layers, pipeline * virtual)
            example = ",".join(str(even + (number < rest)) for number in range(pipeline * virtual))
            advice += f", or set the layers of each chunk: parallel.pipeline_layout=[{example}]"
        yield f"{chunks} does not divide model.layers: {layers}; {advice}"


def _check_pipeline_layout(layout: list[int], chunks: str, num_chunks: int, layers: int) -> Iterator[str]:
    if len(layout) != num_chunks:
        yield (
            f"parallel.pipeline_layout: {len(layout)} entries, but {chunks} is {num_chunks} model chunks; give one "
            "number of layers per chunk, in the order of the model, or null for equal chunks"
        )
        return
    if sum(layout) != layers:
        yield (
            f"parallel.pipeline_layout: adds up to {sum(layout)} layers, but model.layers is {layers}; change the "
            "numbers, or set null for equal chunks"
        )
    # megatron-core cannot send on what it received; embedding or head make a chunk of its own.
    if empty := [str(number) for number, size in enumerate(layout[1:-1], start=1) if size == 0]:
        yield (
            f"parallel.pipeline_layout: entry {', '.join(empty)} is 0; only the first chunk, which has the embedding, "
            "and the last one, which has the output layer, work without layers"
        )


def _check_batch(config: RunConfig, global_: int, micro: int, prefix: str = "", suffix: str = "") -> Iterator[str]:
    pipeline, virtual = config.parallel.pipeline, config.parallel.virtual_pipeline
    yield from _check_divides(f"{prefix}batch.micro{suffix}", micro, "batch.global", global_)
    num_micro, rest = divmod(global_, micro)
    if virtual > 1 and not rest and num_micro % pipeline:
        yield (
            f"{prefix}batch.global{suffix}: {global_} makes {num_micro} micro-batches, which parallel.pipeline: "
            f"{pipeline} does not divide; the interleaved schedule needs a multiple of it"
        )


def _check_own_batch(config: RunConfig) -> Iterator[str]:
    if config.uses_own_batch:
        yield from _check_batch(config, config.batch.global_, config.batch.micro)


def _check_ramp_up(config: RunConfig) -> Iterator[str]:
    ramp, full, micro = config.batch.ramp_up, config.batch.global_, config.batch.micro
    if ramp is None:
        return
    if ramp.start >= full:
        yield f"batch.ramp_up.start: {ramp.start} is not below batch.global: {full}; choose less or remove ramp_up"
        return
    if (full - ramp.start) % ramp.increment:
        yield (
            f"batch.ramp_up.increment: {ramp.increment} does not lead from start: {ramp.start} to batch.global: "
            f"{full}; choose a divisor of {full - ramp.start}"
        )
        return
    pipeline, sizes = config.parallel.pipeline, config.batch.ramp_sizes
    indivisible = [size for size in sizes if size % micro]
    if indivisible and full % micro == 0:
        yield (
            f"batch.ramp_up: batches of {_join_sizes(indivisible)} are not multiples of batch.micro: {micro}; "
            "choose start and increment that are"
        )
    uneven = [size for size in sizes if size % micro == 0 and (size // micro) % pipeline]
    if config.parallel.virtual_pipeline > 1 and uneven:
        yield (
            f"batch.ramp_up: batches of {_join_sizes(uneven)} make numbers of micro-batches that parallel.pipeline: "
            f"{pipeline} does not divide; the interleaved schedule needs multiples"
        )


def _join_sizes(sizes: list[int]) -> str:
    shown = ", ".join(map(str, sizes[:4]))
    return shown if len(sizes) <= 4 else f"{shown} and {len(sizes) - 4} more"


def _check_phase_batches(config: RunConfig) -> Iterator[str]:
    for index, phase in enumerate(config.phases):
        if phase.batch is not None:
            sizes = (config.batch_of(phase), config.micro_batch_of(phase))
            yield from _check_batch(config, *sizes, f"phases[{index}].", f" (phase {phase.name})")


def _check_sequence_shards(config: RunConfig) -> Iterator[str]:
    parallel = config.parallel
    lengths = {"seq_length": config.seq_length}
    for index, phase in enumerate(config.phases):
        if phase.seq_length is not None:
            lengths[f"phases[{index}].seq_length (phase {phase.name})"] = phase.seq_length
    # Tensor-parallel ranks share the part of the sequence that a context-parallel rank has.
    shards = parallel.tensor * parallel.context
    names = "parallel.tensor x parallel.context" if parallel.context > 1 else "parallel.tensor"
    for key, length in lengths.items():
        if parallel.sequence and parallel.tensor > 1 and length % shards:
            yield f"{key}: {length} is not divisible by {names}: {shards}; parallel.sequence needs a multiple of it"
        if parallel.context > 1 and length % (2 * parallel.context):
            text = f"{key}: {length} is not divisible by 2 x parallel.context: {parallel.context}"
            yield f"{text}; each context-parallel rank takes two pieces of a sequence: choose a multiple"


def _check_nested_lengths(config: RunConfig) -> Iterator[str]:
    """Require that every length divides the next one: a span of the longest is cut into samples of any other."""
    lengths = sorted({config.length_of(phase) for phase in config.phases})
    for shorter, longer in pairwise(lengths):
        if longer % shorter:
            names = ", ".join(phase.name for phase in config.phases if config.length_of(phase) == longer)
            yield (
                f"phases[*].seq_length: {longer} (phase {names}) is not a multiple of {shorter}; a span is cut into "
                "samples of every length: choose lengths that divide each other"
            )


def _check_learning_rates(config: RunConfig) -> Iterator[str]:
    schedule = config.schedule
    if schedule.min_lr > schedule.max_lr:
        yield f"schedule.min_lr: {schedule.min_lr:g} is above schedule.max_lr: {schedule.max_lr:g}; swap them"


def _check_blends(config: RunConfig) -> Iterator[str]:
    for index, phase in enumerate(config.phases):
        for name, weight in phase.blend.items():
            key = f"phases[{index}].blend.{name} (phase {phase.name})"
            if name not in config.sources:
                yield f"{key}: not a source; {_source_hint(name, config)}"
            if not math.isfinite(weight) or weight <= 0:
                yield f"{key}: {weight:g} is not a positive weight; remove the source from the blend to skip it"


def _check_exhaustion(config: RunConfig) -> Iterator[str]:
    for name, source in config.sources.items():
        if source.on_exhausted == "renormalize" and source.max_epochs is None:
            yield f"sources.{name}.on_exhausted: renormalize: needs max_epochs, which says when the source has ended"


def _check_fim(config: RunConfig) -> Iterator[str]:
    for name, source in config.sources.items():
        fim, key = source.fim, f"sources.{name}.fim"
        if fim is None:
            continue
        if config.tokenizer is None and config.documents.eod_id is None:
            yield f"{key}: needs the end-of-document id; set tokenizer: KIND:PATH or documents.eod_id"
        ids = {"prefix_id": fim.prefix_id, "middle_id": fim.middle_id, "suffix_id": fim.suffix_id}
        for id_name, value in ids.items():
            if value >= config.model.vocab:
                yield f"{key}.{id_name}: {value} is outside model.vocab: {config.model.vocab}; choose a smaller id"
        if len({*ids.values(), config.documents.eod_id}) < 4:
            yield f"{key}: prefix_id, middle_id, suffix_id and the end-of-document id must differ; choose four ids"


def _check_phase_ends(config: RunConfig) -> Iterator[str]:
    names = [phase.name for phase in config.phases]
    for name in sorted({name for name in names if names.count(name) > 1}):
        yield f"phases: two phases have the name {name}; metrics and plans need different names, so rename one"
    for index, phase in enumerate(config.phases):
        key = f"phases[{index}].until (phase {phase.name})"
        is_last = index == len(config.phases) - 1
        if not is_last and phase.until is None:
            yield f"{key}: missing; every phase but the last needs {{lr: 0.2}}, {{tokens: 250B}} or {{step: 1000}}"
        if is_last and phase.until is not None:
            yield f"{key}: the last phase runs to the end of the run; remove until"


def _check_documents(config: RunConfig) -> Iterator[str]:
    documents, context = config.documents, config.parallel.context
    if documents.reset_attention and context > 1:
        yield (
            f"documents.reset_attention: not possible with parallel.context: {context}, which splits documents over "
            "ranks; remove one of them"
        )
    if documents.eod_id is not None and documents.eod_id >= config.model.vocab:
        yield f"documents.eod_id: {documents.eod_id} is outside model.vocab: {config.model.vocab}; choose a smaller id"


def _check_ema(config: RunConfig) -> Iterator[str]:
    if config.ema is not None and config.precision.has_fp8_weights:
        yield (
            "ema: not possible with precision.fp8.params: true, because weights in FP8 cannot be exchanged with their "
            "average bit for bit; remove one of them"
        )


def _check_spike_warmup(config: RunConfig) -> Iterator[str]:
    spike = config.resilience.spike
    if spike.num_needed > spike.window:
        yield f"resilience.spike.warmup: {spike.num_needed} is above window: {spike.window}; choose at most the window"


def _check_profile(config: RunConfig) -> Iterator[str]:
    if config.profile is not None and config.profile.steps[0] > config.profile.steps[1]:
        first, last = config.profile.steps
        yield f"profile.steps: [{first}, {last}] ends before it begins; give the first and the last step"


def _check_evaluation(config: RunConfig) -> Iterator[str]:
    if config.evaluation is not None and config.tokenizer is None:
        yield "evaluation: needs the tokenizer of the model to encode its tasks; set tokenizer: KIND:PATH"
    if config.evaluation is not None and config.parallel.context > 1:
        yield (
            f"evaluation: not possible with parallel.context: {config.parallel.context}; set it to 1, or remove "
            "evaluation and run `megatron-cpt evaluate` on a checkpoint"
        )


def _check_teacher(config: RunConfig) -> Iterator[str]:
    teacher = config.teacher
    if teacher is None:
        return
    if (teacher.from_ is None) == (teacher.cache is None):
        yield "teacher: give exactly one of from (a checkpoint) and cache (a folder of `megatron-cpt teach`)"
    if teacher.from_ == "init" and config.init.from_ is None:
        yield "teacher.from: init: init.from names no checkpoint; set init.from, or name the teacher's checkpoint"
    if teacher.cache is not None and teacher.temperature != 1:
        yield (
            f"teacher.temperature: {teacher.temperature:g}: a cache holds probabilities at temperature 1; remove it, "
            "or use teacher.from"
        )
    if not any(map(teacher.distills, config.sources)):
        yield "teacher.sources: 0 for every source, so there is no distillation; remove teacher, or one of the zeros"
    yield from _check_teacher_layout(config, teacher)
    for name, factor in teacher.sources.items():
        key = f"teacher.sources.{name}"
        if name not in config.sources:
            yield f"{key}: not a source; {_source_hint(name, config)}"
        if teacher.weight_of(name) > 1:
            yield (
                f"{key}: {factor:g} x teacher.weight: {teacher.weight:g} is above 1, and the cross entropy would count "
                "negatively; choose a smaller factor"
            )


def _check_teacher_layout(config: RunConfig, teacher: TeacherConfig) -> Iterator[str]:
    own, parallel = teacher.layout(config.parallel), config.parallel
    for key, size, of_model in (("tensor", own[0], parallel.tensor), ("pipeline", own[1], parallel.pipeline)):
        if size not in (1, of_model):
            yield f"teacher.{key}: {size}: choose 1 or parallel.{key}: {of_model}"
    if own[0] < parallel.tensor and own[1] > 1:
        yield f"teacher.tensor: {own[0]} needs teacher.pipeline: 1, so that the ranks of the last stage run the teacher"
    if own != (parallel.tensor, parallel.pipeline) and parallel.context > 1:
        yield f"teacher: a layout of its own is not possible with parallel.context: {parallel.context}; remove it"


def _source_hint(name: str, config: RunConfig) -> str:
    near = difflib.get_close_matches(name, list(config.sources), n=1)
    return f"did you mean {near[0]}?" if near else f"known sources: {', '.join(config.sources)}"


MAX_SHOWN_CHUNKS = 32
"""Largest number of model chunks for which a message shows a layout."""

_HEADS = ("model.heads", "model.kv_groups", "model.hidden", "model.head_dim", "model.rotary_percent", "parallel.tensor")
_PIPELINE = ("parallel.pipeline", "parallel.virtual_pipeline")

CHECKS = (
    ConfigCheck(_HEADS, _check_heads),
    ConfigCheck(_HEADS, _check_rotary_size),
    ConfigCheck(("model.ffn_hidden", "model.vocab", "model.vocab_multiple", "parallel.tensor"), _check_widths),
    ConfigCheck(("model.layers", "parallel.pipeline_layout", *_PIPELINE), _check_pipeline),
    ConfigCheck(("batch.global", "batch.micro", "phases[*].batch", "validation", *_PIPELINE), _check_own_batch),
    ConfigCheck(("batch.global", "batch.micro", "batch.ramp_up", *_PIPELINE), _check_ramp_up),
    ConfigCheck(("batch.global", "batch.micro", "phases[*].batch", *_PIPELINE), _check_phase_batches),
    ConfigCheck(
        ("seq_length", "phases[*].seq_length", "parallel.tensor", "parallel.context", "parallel.sequence"),
        _check_sequence_shards,
    ),
    ConfigCheck(("seq_length", "phases[*].seq_length"), _check_nested_lengths),
    ConfigCheck(("schedule.max_lr", "schedule.min_lr"), _check_learning_rates),
    ConfigCheck(("phases[*].blend", "sources"), _check_blends),
    ConfigCheck(("sources",), _check_exhaustion),
    ConfigCheck(("sources", "documents.eod_id", "tokenizer", "model.vocab"), _check_fim),
    ConfigCheck(("phases[*].until", "phases[*].name"), _check_phase_ends),
    ConfigCheck(("documents.eod_id", "model.vocab", "parallel.context"), _check_documents),
    ConfigCheck(("precision.compute", "precision.fp8", "precision.fp4", "model.layers"), check_precision),
    ConfigCheck(("precision.fp8", "parallel.distributed_optimizer", "model.gated"), check_fp8_weights),
    ConfigCheck(
        (*_HEADS, "precision", "model.ffn_hidden", "parallel", "batch", "seq_length", "phases", "validation"),
        check_quantized_shapes,
    ),
    ConfigCheck(("optimizer.moments", "optimizer.betas"), check_moments),
    ConfigCheck(("resilience.spike.warmup", "resilience.spike.window"), _check_spike_warmup),
    ConfigCheck(("ema", "precision.fp8"), _check_ema),
    ConfigCheck(("profile.steps",), _check_profile),
    ConfigCheck(("evaluation", "tokenizer", "parallel.context"), _check_evaluation),
    ConfigCheck(("teacher", "sources", "init.from", "parallel"), _check_teacher),
)
