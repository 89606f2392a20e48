"""Layout of a run on a number of ranks (GPUs, or processes on a CPU)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate

from megatron_cpt.config import RunConfig, format_number_of
from megatron_cpt.planning.problem import Problem

LAYOUT_KEYS = ("parallel", "batch")


@dataclass(frozen=True)
class Layout:
    """Result of `parallel` and `batch` on `num_gpus` ranks.

    Attributes:
        num_gpus: number of ranks.
        data_parallel: replicas of the model, each of `parallel.model_parallel_size` ranks.
        num_micro_batches: micro-batches per replica and step.
        bubble: share of a step in which a pipeline stage waits (Narayanan et al., arXiv 2104.04473).
    """

    num_gpus: int
    data_parallel: int
    num_micro_batches: int
    bubble: float

    @classmethod
    def build(cls, config: RunConfig, num_gpus: int | None = None) -> Layout:
        """Return the layout on `num_gpus` ranks; None means one replica of the model."""
        replica = config.parallel.model_parallel_size
        num_gpus = num_gpus or replica
        replicas = max(1, num_gpus // replica)
        micro_batches = max(1, config.batch.global_ // (config.batch.micro * replicas))
        waiting = (config.parallel.pipeline - 1) / config.parallel.virtual_pipeline
        return cls(num_gpus, replicas, micro_batches, waiting / (micro_batches + waiting))


def stage_chunks(config: RunConfig, stage: int) -> list[range]:
    """Return the layers of every model chunk of a pipeline stage.

    With 8 layers, 2 stages of 2 chunks each and `pipeline_layout: [3, 2, 2, 1]`, stage 1 has layers 3, 4 and layer 7.
    """
    parallel, layers = config.parallel, config.model.layers
    pipeline, sizes = parallel.pipeline, parallel.pipeline_layout
    num_chunks = pipeline * parallel.virtual_pipeline
    numbers = range(stage, num_chunks, pipeline)
    if sizes is None or len(sizes) != num_chunks:  # `config/checks.py` reports the wrong length
        size = max(1, layers // num_chunks)
        return [range(number * size, (number + 1) * size) for number in numbers]
    firsts = [0, *accumulate(sizes)]
    return [range(firsts[number], firsts[number + 1]) for number in numbers]


def layers_of_stage(config: RunConfig, stage: int) -> int:
    """Return the number of layers of a pipeline stage."""
    return sum(map(len, stage_chunks(config, stage)))


def layout_problems(config: RunConfig, num_gpus: int) -> Iterator[Problem]:
    """Yield the reasons why the run cannot use this number of ranks."""
    parallel, batch = config.parallel, config.batch
    replica = parallel.model_parallel_size
    if num_gpus % replica:
        parts = f"parallel.tensor x pipeline x context = {parallel.tensor} x {parallel.pipeline} x {parallel.context}"
        yield Problem(
            f"{format_number_of(num_gpus, 'rank')}: not a multiple of {parts} = {replica}; change one of them",
            LAYOUT_KEYS,
        )
        return
    replicas = num_gpus // replica
    if not config.uses_own_batch or batch.global_ % batch.micro:
        return  # `batch_problems` checks the batches of phases, config/checks.py the divisibility
    if batch.global_ % (batch.micro * replicas):
        text = f"batch.global: {batch.global_} is not a multiple of batch.micro: {batch.micro} x {replicas} replicas"
        yield Problem(
            f"{text} ({format_number_of(num_gpus, 'rank')} of {replica} each); change one of them", LAYOUT_KEYS
        )
    elif parallel.virtual_pipeline > 1 and (batch.global_ // batch.micro // replicas) % parallel.pipeline:
        text = (
            f"batch.global: {batch.global_} makes {batch.global_ // batch.micro // replicas} micro-batches per replica"
        )
        text += f", which parallel.pipeline: {parallel.pipeline} does not divide"
        yield Problem(f"{text}; the interleaved schedule needs a multiple", LAYOUT_KEYS)
