"""Time of the collectives of a layout, from the published bandwidths of a GPU's links.

In a ring (Patarasu and Yuan 2009; the bus bandwidth of NCCL) an all-gather or reduce-scatter of B bytes over n ranks
sends B (n - 1) / n over each link. Ranks are placed in megatron-core's default order: tensor-parallel ranks are
neighbors, then context, data and pipeline parallel ranks. In a node of 8 GPUs at TP2, four ranks of a data-parallel
group share the node, so its ring leaves the node over four adapters at the same time.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_cpt.config import RunConfig
from megatron_cpt.planning.cost.activations import tokens_of_micro_batch
from megatron_cpt.planning.cost.formats import format_of
from megatron_cpt.planning.cost.memory import quantized_parameters, stage_parameters
from megatron_cpt.planning.cost.parameters import key_value_size
from megatron_cpt.planning.cost.rank_layout import Layout
from megatron_cpt.planning.hardware import Gpu

# NCCL's maintainers expect 46 to 48 GB/s of a 400 Gb/s (50 GB/s) adapter (NVIDIA/nccl-tests issue 290). Rings over
# NVLink are assumed to reach 0.8 of its peak, without NVLink SHARP, which serves all-reduces only.
NVLINK_EFFICIENCY = 0.8
NETWORK_EFFICIENCY = 0.92
# Gradients are reduced in fp32 (`grad_reduce_in_fp32`), weights are gathered in bf16; see `Format` for FP8 weights.
GRADIENT_BYTES = 4
WEIGHT_BYTES = 2


@dataclass(frozen=True)
class Links:
    """Bandwidths between the ranks of a layout for large messages, in bytes per second.

    Attributes:
        tensor: inside a tensor-parallel group.
        context: inside a context-parallel group.
        data: inside a group of data-parallel (and context-parallel) ranks, which share gradients.
        pipeline: from one stage to the next.
    """

    tensor: float
    context: float
    data: float
    pipeline: float

    @classmethod
    def build(cls, config: RunConfig, layout: Layout, gpu: Gpu) -> Links:
        """Return the bandwidths of a layout on nodes of a GPU."""
        parallel = config.parallel
        in_one_node = parallel.model_parallel_size * layout.data_parallel <= gpu.gpus_per_node
        return cls(
            tensor=_ring_bandwidth(parallel.tensor, 1, gpu),
            context=_ring_bandwidth(parallel.context, parallel.tensor, gpu),
            data=_ring_bandwidth(layout.data_parallel * parallel.context, parallel.tensor, gpu),
            # Pipeline ranks are farthest apart.
            pipeline=NVLINK_EFFICIENCY * gpu.nvlink if in_one_node else NETWORK_EFFICIENCY * gpu.network,
        )


def _ring_bandwidth(size: int, stride: int, gpu: Gpu) -> float:
    """Return the bandwidth of a ring of `size` ranks whose numbers are `stride` apart."""
    inside = NVLINK_EFFICIENCY * gpu.nvlink
    if size * stride <= gpu.gpus_per_node:
        return inside
    members_in_node = max(1, gpu.gpus_per_node // stride)
    return min(inside, NETWORK_EFFICIENCY * gpu.network * members_in_node)


def tensor_seconds_per_layer(config: RunConfig, links: Links) -> float:
    """Return seconds of tensor parallelism per layer and micro-batch, forward and backward, without overlap.

    Sequence parallelism needs an all-gather before and a reduce-scatter after attention and MLP, forward and backward:
    2 x 2 x 2 = 8. Without it there are 4 all-reduces of twice the volume. The gather of inputs for weight gradients is
    not counted: it runs beside a matrix product.
    """
    size = config.parallel.tensor
    hidden = WEIGHT_BYTES * config.model.hidden * tokens_of_micro_batch(config)
    return 8 * hidden * ((size - 1) / size) / links.tensor


def context_seconds_per_layer(config: RunConfig, links: Links) -> float:
    """Return seconds in which keys and values of a layer and micro-batch pass all context-parallel ranks.

    They pass once forward, and once backward together with their gradients.
    """
    parallel = config.parallel
    one_round = WEIGHT_BYTES * key_value_size(config.model) / parallel.tensor * tokens_of_micro_batch(config)
    return (1 + 2) * one_round * (parallel.context - 1) / links.context


def pipeline_seconds(config: RunConfig, links: Links) -> float:
    """Return seconds to send the activations of a micro-batch to the next stage and the gradients back."""
    parallel = config.parallel
    if parallel.pipeline == 1:
        return 0.0
    shards = parallel.tensor if parallel.sequence else 1
    return 2 * WEIGHT_BYTES * config.model.hidden * tokens_of_micro_batch(config) / shards / links.pipeline


@dataclass(frozen=True)
class GradientExchange:
    """Seconds of data parallelism per step on one stage, without overlap.

    Attributes:
        reduce: reduce-scatter of the gradients (all-reduce without the distributed optimizer).
        gather: all-gather of the updated weights (none without the distributed optimizer).
    """

    reduce: float
    gather: float

    @classmethod
    def build(
        cls, config: RunConfig, layout: Layout, links: Links, stage: int, *, gradient_bytes: int = GRADIENT_BYTES
    ) -> GradientExchange:
        """Return the exchange of a stage; `gradient_bytes` is the size of a reduced gradient."""
        parameters, kind = stage_parameters(config, stage), format_of(config)
        ranks = layout.data_parallel * config.parallel.context
        share = (ranks - 1) / ranks
        reduce = gradient_bytes * parameters * share / links.data
        if not config.parallel.distributed_optimizer:
            return cls(2 * reduce, 0.0)
        gathered = WEIGHT_BYTES * parameters
        if kind is not None and config.precision.has_fp8_weights:
            gathered += (kind.gathered - WEIGHT_BYTES) * quantized_parameters(config, stage)
        return cls(reduce, gathered * share / links.data)
