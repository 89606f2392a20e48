"""Which layout of a run is fastest on a number of GPUs: all that divide and fit, by their estimated speed.

A layout has to divide and fit every step of the run, the small batches of a ramp-up and the long sequences of a phase
too. The speeds are those of the steps that most tokens are trained in, with the knobs of the run's own `speed`;
`tp_comm_overlap`, which is off by default, belongs to every layout that it is possible in, unless the run says no.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from megatron_cpt.config import RunConfig
from megatron_cpt.config.checks import CHECKS
from megatron_cpt.plan.cluster.advice import Advice, Candidate, Misfit, split_name
from megatron_cpt.plan.cluster.estimate import (
    MEMORY_MARGIN,
    fits,
    largest_segment,
    overlapped_speed,
    shaped,
    step_lines,
)
from megatron_cpt.plan.cluster.step_time import Overlap, Speed, estimate_speed, with_tensor_overlap
from megatron_cpt.plan.cost.memory import GIB, Memory, estimate_memory
from megatron_cpt.plan.cost.rank_layout import Layout, layout_problems
from megatron_cpt.plan.hardware import Gpu
from megatron_cpt.plan.run_plan import RunPlan
from megatron_cpt.plan.timeline.phases import batch_problems
from megatron_cpt.plan.timeline.segments import Segment

MICRO_BATCHES = (1, 2, 4, 8)
CONTEXTS = (1, 2, 4, 8)
# In the order of their price; `selective` is left out: it recomputes core attention, of which fused kernels keep
# next to nothing anyway.
RECOMPUTE = ("none", "full")
# More context parallelism, or another global batch, is worth it from this much speed on.
WORTH_MORE = 1.01
# Layouts this near to the best one are as good as the model can tell (docs/adviser.md: its mean error).
AS_GOOD = 0.95


def advise(config: RunConfig, plan: RunPlan, num_gpus: int, gpu: Gpu) -> Advice:
    """Try every layout of a planned run."""
    best: list[Candidate] = []
    misfits: list[Misfit] = []
    other_batches: list[Candidate] = []
    num_tried = 0
    plans = {micro: _with_micro_batch(config, plan, micro) for micro in (*MICRO_BATCHES, config.batch.micro)}
    for split in _splits(config, num_gpus, gpu):
        layouts = [(layout, plans[layout.batch.micro]) for layout in _layouts(split)]
        num_tried += len(layouts)
        candidates = [_candidate(*one, num_gpus, gpu) for one in layouts if not _problems(*one, num_gpus)]
        fitting = [candidate for candidate in candidates if fits(candidate.memory, gpu)]
        if fitting:
            fastest = max(fitting, key=_rank)
            if _is_worth_its_context(fastest, best):
                best.append(fastest)
            continue
        misfits.append(_misfit(split, plans[1], candidates, num_gpus, gpu))
        if not candidates and plan.is_uniform:
            other_batches += _with_other_batch(layouts, num_gpus, gpu)
    best.sort(key=_rank, reverse=True)
    own = next(iter(_problems(config, plan, num_gpus)), "")
    current = None if own else _candidate(config, plan, num_gpus, gpu)
    if current is not None and not fits(current.memory, gpu):
        own = _too_large(current.memory, gpu)
    return Advice(
        gpu=gpu,
        num_gpus=num_gpus,
        steps=largest_segment(plan),
        is_uniform=plan.is_uniform,
        ranking=best,
        current=current,
        current_overlapped=overlapped_speed(config, plan, gpu, num_gpus) if current is not None else None,
        current_problem=own,
        misfits=misfits,
        other_batch=_worth_it(other_batches, best),
        num_tried=num_tried,
    )


def _with_micro_batch(config: RunConfig, plan: RunPlan, micro: int) -> RunPlan:
    """The plan with another `batch.micro`, which phases with a micro-batch of their own do not heed."""
    own = {phase.name for phase in config.phases if phase.batch is not None and phase.batch.micro is not None}
    phases = [
        phase
        if phase.name in own
        else replace(phase, segments=tuple(replace(segment, micro_batch=micro) for segment in phase.segments))
        for phase in plan.phases
    ]
    return replace(plan, phases=phases)


def _rank(candidate: Candidate) -> tuple[float, float]:
    """Faster first; of equals the one that needs less memory."""
    return round(candidate.speed.tokens_per_gpu, 1), -candidate.memory.total


def _is_worth_its_context(candidate: Candidate, others: Sequence[Candidate]) -> bool:
    """Context parallelism has to buy something over the same split with less of it, which is simpler to run."""
    mine = candidate.config.parallel
    simpler = (
        other.speed.tokens_per_gpu
        for other in others
        if (other.config.parallel.tensor, other.config.parallel.pipeline) == (mine.tensor, mine.pipeline)
        and other.config.parallel.context < mine.context
    )
    return all(candidate.speed.tokens_per_gpu > WORTH_MORE * speed for speed in simpler)


def _splits(config: RunConfig, num_gpus: int, gpu: Gpu) -> Iterator[RunConfig]:
    """Every TP x PP x CP of these GPUs that divides the model; TP and CP stay inside a node, where NVLink is."""
    model = config.model
    lengths = {config.seq_length, *(config.length_of(phase) for phase in config.phases)}
    for tensor in _divisors(min(gpu.gpus_per_node, num_gpus)):
        if model.num_kv_groups % tensor or model.ffn_hidden % tensor or model.padded_vocab % tensor:
            continue
        for context in CONTEXTS:
            if tensor * context > gpu.gpus_per_node or any(length % (2 * context * tensor) for length in lengths):
                continue
            for pipeline in _divisors(model.layers):
                if num_gpus % (tensor * context * pipeline):
                    continue
                parallel = {"tensor": tensor, "pipeline": pipeline, "context": context, "virtual_pipeline": 1}
                parallel |= {"sequence": tensor > 1, "distributed_optimizer": True}
                yield config.model_copy(update={"parallel": config.parallel.model_copy(update=parallel)})


def _layouts(split: RunConfig) -> Iterator[RunConfig]:
    """A split with every number of model chunks, micro-batch and recomputation."""
    parallel = split.parallel
    chunks = _divisors(split.model.layers // parallel.pipeline) if parallel.pipeline > 1 else [1]
    for virtual in chunks:
        chunked = parallel.model_copy(update={"virtual_pipeline": virtual})
        for micro in MICRO_BATCHES:
            batch = split.batch.model_copy(update={"micro": micro})
            for granularity in RECOMPUTE:
                recompute = split.recompute.model_copy(
                    update={"granularity": granularity, "method": "uniform", "num_layers": 1}
                )
                changes = {"parallel": chunked, "batch": batch, "recompute": recompute}
                yield with_tensor_overlap(split.model_copy(update=changes))


def _divisors(number: int) -> list[int]:
    return [divisor for divisor in range(1, number + 1) if number % divisor == 0]


def _problems(config: RunConfig, plan: RunPlan, num_gpus: int) -> list[str]:
    """What the checks of run.yaml and of a launch would say."""
    found = [text for check in CHECKS for text in check.find(config)]
    launch = (*layout_problems(config, num_gpus), *batch_problems(config, plan.phases, num_gpus))
    return found + [problem.text for problem in launch]


def _candidate(config: RunConfig, plan: RunPlan, num_gpus: int, gpu: Gpu) -> Candidate:
    # Of steps that differ in nothing but their batch, those with the most micro-batches have the most in flight.
    shapes = {(segment.micro_batch, segment.seq_length): segment for segment in sorted(plan.segments, key=_batch)}
    runs = [shaped(config, segment) for segment in (largest_segment(plan), *shapes.values())]
    layouts = [Layout.build(run, num_gpus) for run in runs]
    speed, plain = estimate_speed(runs[0], layouts[0], gpu), None
    overlap = Overlap.of(config)
    if overlap.tensor:
        plain = estimate_speed(runs[0], layouts[0], gpu, replace(overlap, tensor=False))
    memories = [estimate_memory(run, layout, gpu=gpu) for run, layout in zip(runs[1:], layouts[1:], strict=True)]
    return Candidate(config, layouts[0], max(memories, key=lambda memory: memory.total), speed, plain, _why(speed))


def _batch(segment: Segment) -> int:
    return segment.global_batch


def _why(speed: Speed) -> str:
    """The share of useful work, and the two largest of what is not."""
    shares = dict(step_lines(speed))
    work = shares.pop("matrix products") + shares.pop("attention")
    shares.pop("memory-bound kernels")  # every layout has them, about alike
    lost = [f"{share:.1%} {name}" for name, share in shares.items() if share >= 0.005][:2]
    return f"{work:.0%} matmul and attention; lost: {', '.join(lost) or 'next to nothing'}"


def _too_large(memory: Memory, gpu: Gpu) -> str:
    usable = (1 - MEMORY_MARGIN) * gpu.memory_gib
    states = (memory.weights + memory.gradients + memory.optimizer) / GIB
    return (
        f"needs {memory.total / GIB:.0f} GiB on stage {memory.stage} ({states:.0f} of them weights, gradients and "
        f"optimizer), {usable:.0f} are usable"
    )


def _misfit(split: RunConfig, plan: RunPlan, candidates: Sequence[Candidate], num_gpus: int, gpu: Gpu) -> Misfit:
    """What keeps a split; `plan`: the run's with the smallest micro-batch."""
    if candidates:
        smallest = min(candidates, key=lambda candidate: candidate.memory.total)
        how = f"micro-batch {smallest.config.batch.micro}, recompute {smallest.config.recompute.granularity}"
        return Misfit(split_name(split), f"{_too_large(smallest.memory, gpu)}, even with {how}")
    smallest_batch = split.model_copy(update={"batch": split.batch.model_copy(update={"micro": 1})})
    return Misfit(split_name(split), _problems(smallest_batch, plan, num_gpus)[0])


def _with_other_batch(layouts: Sequence[tuple[RunConfig, RunPlan]], num_gpus: int, gpu: Gpu) -> Iterator[Candidate]:
    """Layouts that do not divide the global batch, with the nearest batch below that they do divide."""
    for layout, plan in layouts:
        parallel = layout.parallel
        unit = layout.batch.micro * num_gpus // parallel.model_parallel_size
        unit *= parallel.pipeline if parallel.virtual_pipeline > 1 else 1
        nearest = layout.batch.global_ // unit * unit
        if nearest == 0:
            continue
        changed = layout.model_copy(update={"batch": layout.batch.model_copy(update={"global_": nearest})})
        phases = [
            replace(phase, segments=tuple(replace(segment, global_batch=nearest) for segment in phase.segments))
            for phase in plan.phases
        ]
        if not _problems(changed, replace(plan, phases=phases), num_gpus):
            candidate = _candidate(changed, replace(plan, phases=phases), num_gpus, gpu)
            if fits(candidate.memory, gpu):
                yield candidate


def _worth_it(others: Sequence[Candidate], best: Sequence[Candidate]) -> Candidate | None:
    fastest = max(others, key=_rank, default=None)
    if fastest is None or not best:
        return fastest
    is_faster = fastest.speed.tokens_per_gpu > WORTH_MORE * best[0].speed.tokens_per_gpu
    return fastest if is_faster else None
