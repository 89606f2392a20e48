"""Search for the fastest layout of a run on a number of GPUs, by estimated speed and memory.

A layout must divide and fit every step of the run, including the small batches of a ramp-up and the long sequences of a
phase. Its speed is the speed in the steps that train most tokens, with the run's own options below `speed`. The option
`tp_comm_overlap`, off by default, is on in every layout that allows it, unless the run sets it to false.

Pipelines are tried with stages of equal depth, and with the depths that balance their time: with a large vocabulary the
last stage, which has the head, takes fewer layers (`parallel.pipeline_layout`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from megatron_cpt.config import RunConfig
from megatron_cpt.planning.cluster.estimate import (
    MEMORY_MARGIN,
    Candidate,
    candidate_problems,
    explain_memory,
    fits,
    largest_segment,
    overlapped_speed,
    split_name,
)
from megatron_cpt.planning.cluster.step_time import Speed, with_balanced_stages, with_tensor_overlap
from megatron_cpt.planning.cost.rank_layout import Layout
from megatron_cpt.planning.hardware import Gpu
from megatron_cpt.planning.run_plan import RunPlan
from megatron_cpt.planning.timeline.segments import Segment

MICRO_BATCHES = (1, 2, 4, 8)
CONTEXTS = (1, 2, 4, 8)
# By increasing cost. `selective` is missing: it recomputes core attention, of which fused kernels save next to nothing.
RECOMPUTE = ("none", "full")
# Smallest gain in speed for which more context parallelism, or another global batch, is proposed.
MIN_GAIN = 1.01
# Layouts within 5% of the best cannot be told apart: docs/internals/adviser.md reports the mean error of the estimate.
AS_GOOD = 0.95


@dataclass(frozen=True)
class Advice:
    """Ranked layouts of a run.

    Attributes:
        steps: a segment with the shape of the steps whose speed is given.
        is_uniform: all steps of the run have that shape.
        ranking: the best layout of each split that fits, the fastest first.
        current: the run's own layout; None if it does not divide.
        current_overlapped: its speed with `speed.tp_comm_overlap`; None if the run sets that or it is not possible.
        current_problem: why the run's own layout cannot run on these GPUs; empty if it can.
        misfits: reasons why splits do not divide or fit, by name of the split.
        other_batch: the best layout of a split that needs another global batch; None if none is faster.
    """

    gpu: Gpu
    num_gpus: int
    steps: Segment
    is_uniform: bool
    ranking: Sequence[Candidate]
    current: Candidate | None
    current_overlapped: Speed | None
    current_problem: str
    misfits: Mapping[str, str]
    other_batch: Candidate | None
    num_tried: int

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for `plan --advise --json`."""
        return {
            "gpu": self.gpu.name,
            "num_gpus": self.num_gpus,
            "memory_gib": self.gpu.memory_gib,
            "memory_margin": MEMORY_MARGIN,
            "is_calibrated": self.gpu.is_calibrated,
            "speed_of": {"global_batch": self.steps.global_batch, "seq_length": self.steps.seq_length},
            "ranking": [candidate.to_dict() for candidate in self.ranking],
            "current": self.current and self.current.to_dict(),
            "current_problem": self.current_problem,
            "misfits": [{"split": split, "reason": reason} for split, reason in self.misfits.items()],
            "other_batch": self.other_batch and self.other_batch.to_dict(),
            "num_tried": self.num_tried,
        }


def advise(config: RunConfig, plan: RunPlan, num_gpus: int, gpu: Gpu) -> Advice:
    """Try every layout of a planned run on `num_gpus` GPUs and rank the layouts that fit."""
    best: list[Candidate] = []
    misfits: dict[str, str] = {}
    other_batches: list[Candidate] = []
    num_tried = 0
    use_run_micro = {phase.name for phase in config.phases if phase.batch is None or phase.batch.micro is None}
    plans = {
        micro: _with_segments(plan, use_run_micro, micro_batch=micro) for micro in (*MICRO_BATCHES, config.batch.micro)
    }
    for split in _splits(config, num_gpus, gpu):
        layouts = [(layout, plans[layout.batch.micro]) for layout in _layouts(split, num_gpus, gpu)]
        num_tried += len(layouts)
        possible = [pair for pair in layouts if not candidate_problems(*pair, num_gpus)]
        candidates = [Candidate.build(*pair, num_gpus, gpu) for pair in possible]
        fitting = [candidate for candidate in candidates if fits(candidate.memory, gpu)]
        if fitting:
            fastest = max(fitting, key=_rank)
            if _is_worth_its_context(fastest, best):
                best.append(fastest)
            continue
        misfits[split_name(split)] = _why_not(split, plans[1], candidates, num_gpus, gpu)
        if not candidates and plan.is_uniform:
            other_batches += _with_other_batch(layouts, num_gpus, gpu)
    best.sort(key=_rank, reverse=True)
    problem = next(iter(candidate_problems(config, plan, num_gpus)), "")
    current = None if problem else Candidate.build(config, plan, num_gpus, gpu)
    if current is not None and not fits(current.memory, gpu):
        problem = explain_memory(current.memory, gpu)
    other_batch = max(other_batches, key=_rank, default=None)
    if other_batch and best and other_batch.speed.tokens_per_gpu <= MIN_GAIN * best[0].speed.tokens_per_gpu:
        other_batch = None
    return Advice(
        gpu=gpu,
        num_gpus=num_gpus,
        steps=largest_segment(plan),
        is_uniform=plan.is_uniform,
        ranking=best,
        current=current,
        current_overlapped=overlapped_speed(config, plan, gpu, num_gpus) if current is not None else None,
        current_problem=problem,
        misfits=misfits,
        other_batch=other_batch,
        num_tried=num_tried,
    )


def _with_segments(plan: RunPlan, names: set[str], **changes: Any) -> RunPlan:
    """Return the plan with fields of all segments changed in the named phases."""
    phases = [
        replace(phase, segments=tuple(replace(segment, **changes) for segment in phase.segments))
        if phase.name in names
        else phase
        for phase in plan.phases
    ]
    return replace(plan, phases=phases)


def _rank(candidate: Candidate) -> tuple[float, float]:
    """Return a sort key: faster is better, then less memory."""
    return round(candidate.speed.tokens_per_gpu, 1), -candidate.memory.total


def _is_worth_its_context(candidate: Candidate, others: Sequence[Candidate]) -> bool:
    """Return False if the same TP x PP with less context parallelism, which is simpler to run, is as fast."""
    own = candidate.config.parallel
    simpler = (
        other.speed.tokens_per_gpu
        for other in others
        if (other.config.parallel.tensor, other.config.parallel.pipeline) == (own.tensor, own.pipeline)
        and other.config.parallel.context < own.context
    )
    return all(candidate.speed.tokens_per_gpu > MIN_GAIN * speed for speed in simpler)


def _splits(config: RunConfig, num_gpus: int, gpu: Gpu) -> Iterator[RunConfig]:
    """Yield the run with every TP x PP x CP that divides the model; TP x CP stays inside a node, which has NVLink."""
    model = config.model
    lengths = {config.seq_length, *(config.length_of(phase) for phase in config.phases)}
    for tensor in _divisors(min(gpu.gpus_per_node, num_gpus)):
        if model.num_kv_groups % tensor or model.ffn_hidden % tensor or model.padded_vocab % tensor:
            continue
        for context in CONTEXTS:
            if tensor * context > gpu.gpus_per_node or any(length % (2 * context * tensor) for length in lengths):
                continue
            if num_gpus % (tensor * context):
                continue
            for pipeline in _divisors(num_gpus // (tensor * context)):
                if pipeline > model.layers:
                    continue
                parallel: dict[str, int | None] = {"tensor": tensor, "pipeline": pipeline, "context": context}
                parallel |= {"virtual_pipeline": 1}
                parallel |= {"sequence": tensor > 1, "distributed_optimizer": True}
                if config.parallel.pipeline_layout is not None:
                    parallel |= {"pipeline_layout": None}
                yield config.model_copy(update={"parallel": config.parallel.model_copy(update=parallel)})


def _layouts(split: RunConfig, num_gpus: int, gpu: Gpu) -> Iterator[RunConfig]:
    """Yield a split with every number of model chunks, micro-batch size and recomputation, equal or balanced stages."""
    parallel, num_layers = split.parallel, split.model.layers
    for virtual in _divisors(num_layers // parallel.pipeline) if parallel.pipeline > 1 else [1]:
        chunked = parallel.model_copy(update={"virtual_pipeline": virtual})
        for micro in MICRO_BATCHES:
            batch = split.batch.model_copy(update={"micro": micro})
            for granularity in RECOMPUTE:
                recompute = {"granularity": granularity, "method": "uniform", "num_layers": 1}
                changes = {"parallel": chunked, "batch": batch}
                changes |= {"recompute": split.recompute.model_copy(update=recompute)}
                layout = with_tensor_overlap(split.model_copy(update=changes))
                is_even = num_layers % (parallel.pipeline * virtual) == 0
                if is_even:
                    yield layout
                if parallel.pipeline > 1:
                    balanced = with_balanced_stages(layout, Layout.build(layout, num_gpus), gpu)
                    if not is_even or len(set(balanced.parallel.pipeline_layout or ())) > 1:
                        yield balanced


def _divisors(number: int) -> list[int]:
    return [divisor for divisor in range(1, number + 1) if number % divisor == 0]


def _why_not(split: RunConfig, plan: RunPlan, candidates: Sequence[Candidate], num_gpus: int, gpu: Gpu) -> str:
    """Return why no layout of a split can run; `plan` has the smallest micro-batch."""
    if candidates:
        smallest = min(candidates, key=lambda candidate: candidate.memory.total)
        how = f"micro-batch {smallest.config.batch.micro}, recompute {smallest.config.recompute.granularity}"
        return f"{explain_memory(smallest.memory, gpu)}, even with {how}"
    smallest_batch = split.model_copy(update={"batch": split.batch.model_copy(update={"micro": 1})})
    return candidate_problems(smallest_batch, plan, num_gpus)[0]


def _with_other_batch(layouts: Sequence[tuple[RunConfig, RunPlan]], num_gpus: int, gpu: Gpu) -> Iterator[Candidate]:
    """Yield layouts that do not divide the global batch, with the nearest smaller batch that they divide.

    48 GPUs at TP2 are 24 replicas; with `micro: 2` a batch is a multiple of 48, so 1,100 becomes 1,056.
    """
    for layout, plan in layouts:
        parallel = layout.parallel
        unit = layout.batch.micro * num_gpus // parallel.model_parallel_size
        unit *= parallel.pipeline if parallel.virtual_pipeline > 1 else 1
        nearest = layout.batch.global_ // unit * unit
        if nearest == 0:
            continue
        changed = layout.model_copy(update={"batch": layout.batch.model_copy(update={"global_": nearest})})
        changed_plan = _with_segments(plan, {phase.name for phase in plan.phases}, global_batch=nearest)
        if not candidate_problems(changed, changed_plan, num_gpus):
            candidate = Candidate.build(changed, changed_plan, num_gpus, gpu)
            if fits(candidate.memory, gpu):
                yield candidate
