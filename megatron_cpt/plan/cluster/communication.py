"""How long the collectives of a layout take, from the published bandwidths of a GPU's links.

Ring algorithms (Patarasu and Yuan 2009; what NCCL calls bus bandwidth): an all-gather or reduce-scatter of B bytes over
n ranks sends B (n - 1) / n over each link. Ranks are placed as megatron-core places them by default: tensor parallel
ranks are neighbors, then context, data and pipeline parallel ones; so in a node of 8 GPUs at TP2 four ranks of a
data-parallel group share the node, and its ring leaves the node over four adapters at once.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_cpt.config import RunConfig
from megatron_cpt.plan.cost.activations import tokens_of_micro_batch
from megatron_cpt.plan.cost.formats import format_of
from megatron_cpt.plan.cost.memory import quantized_parameters, stage_parameters
from megatron_cpt.plan.cost.parameters import key_value_size
from megatron_cpt.plan.cost.rank_layout import Layout
from megatron_cpt.plan.hardware import Gpu

# Of a 400 Gb/s adapter (50 GB/s) NCCL's maintainers expect 46 to 48 GB/s (NVIDIA/nccl-tests issue 290). Rings over
# NVLink are assumed to reach 0.8 of its peak: without NVLink SHARP, which serves all-reduces.
NVLINK_EFFICIENCY = 0.8
NETWORK_EFFICIENCY = 0.92
# megatron-core reduces gradients in fp32 here (`grad_reduce_in_fp32`), and gathers weights in bf16 (see `Format`).
GRADIENT_BYTES = 4
WEIGHT_BYTES = 2


@dataclass(frozen=True)
class Links:
    """The links between the ranks of a layout, in bytes/s that large messages reach.

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
        """The links of a layout on nodes of a GPU."""
        parallel = config.parallel
        inner = parallel.tensor * parallel.context
        return cls(
            tensor=_ring(parallel.tensor, 1, gpu),
            context=_ring(parallel.context, parallel.tensor, gpu),
            data=_ring(layout.data_parallel * parallel.context, parallel.tensor, gpu),
            pipeline=_neighbors(inner * layout.data_parallel * parallel.pipeline, gpu),
        )


def _ring(size: int, stride: int, gpu: Gpu) -> float:
    """Bandwidth of a ring of `size` ranks that lie `stride` apart."""
    inside = NVLINK_EFFICIENCY * gpu.nvlink
    if size * stride <= gpu.gpus_per_node:
        return inside
    members_in_node = max(1, gpu.gpus_per_node // stride)
    return min(inside, NETWORK_EFFICIENCY * gpu.network * members_in_node)


def _neighbors(num_gpus: int, gpu: Gpu) -> float:
    """Bandwidth to the same place in the next stage: pipeline ranks lie farthest apart."""
    in_one_node = num_gpus <= gpu.gpus_per_node
    return NVLINK_EFFICIENCY * gpu.nvlink if in_one_node else NETWORK_EFFICIENCY * gpu.network


def _share(size: int) -> float:
    return (size - 1) / size


def tensor_seconds_a_layer(config: RunConfig, links: Links) -> float:
    """Tensor parallelism of one layer and micro-batch, forward and backward, none of it hidden.

    With sequence parallelism an all-gather before and a reduce-scatter after attention and MLP, both ways: 8. Without
    it 4 all-reduces, of twice the volume each. (The gather of inputs for the weights' gradients runs beside a matrix
    product.)
    """
    size = config.parallel.tensor
    hidden = WEIGHT_BYTES * config.model.hidden * tokens_of_micro_batch(config)
    return 8 * hidden * _share(size) / links.tensor


def context_seconds_a_layer(config: RunConfig, links: Links) -> float:
    """Keys and values of one layer and micro-batch going round: once forward; backward with their gradients."""
    parallel = config.parallel
    one_round = WEIGHT_BYTES * key_value_size(config.model) / parallel.tensor * tokens_of_micro_batch(config)
    return (1 + 2) * one_round * (parallel.context - 1) / links.context


def pipeline_seconds(config: RunConfig, links: Links) -> float:
    """One micro-batch's activations to the next stage and its gradients back."""
    parallel = config.parallel
    if parallel.pipeline == 1:
        return 0.0
    shards = parallel.tensor if parallel.sequence else 1
    return 2 * WEIGHT_BYTES * config.model.hidden * tokens_of_micro_batch(config) / shards / links.pipeline


@dataclass(frozen=True)
class GradientExchange:
    """Data parallelism of one step on one stage, in seconds, none of it hidden.

    Attributes:
        reduce: reduce-scatter of the gradients (with a plain optimizer: all-reduce).
        gather: all-gather of the updated weights (with a plain optimizer: none).
    """

    reduce: float
    gather: float

    @classmethod
    def build(
        cls, config: RunConfig, layout: Layout, links: Links, stage: int, *, gradient_bytes: int = GRADIENT_BYTES
    ) -> GradientExchange:
        """The exchange of a stage; `gradient_bytes`: of one gradient as it is sent."""
        parameters, kind = stage_parameters(config, stage), format_of(config)
        share = _share(layout.data_parallel * config.parallel.context)
        reduce = gradient_bytes * parameters * share / links.data
        if not config.parallel.distributed_optimizer:
            return cls(2 * reduce, 0.0)
        gathered = WEIGHT_BYTES * parameters
        if kind is not None and config.precision.has_fp8_weights:
            gathered += (kind.gathered - WEIGHT_BYTES) * quantized_parameters(config, stage)
        return cls(reduce, gathered * share / links.data)
