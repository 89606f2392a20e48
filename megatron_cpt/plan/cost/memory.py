"""The memory that a GPU (or a rank on a CPU) needs, part by part and pipeline stage by pipeline stage.

States follow ZeRO (Rajbhandari et al., arXiv 1910.02054); what a forward and backward pass needs is counted in
`plan/cost/activations.py`. What a GPU loses besides (`reserved`) is only known where the GPU is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

from megatron_cpt.config import RunConfig
from megatron_cpt.config.knobs import GPU_CLUSTER, resolve_speed
from megatron_cpt.plan.cost.activations import (
    Spec,
    default_spec,
    kept_bytes,
    layers_of_stage,
    logits_bytes,
    tokens_of_micro_batch,
    working_bytes,
)
from megatron_cpt.plan.cost.formats import format_of, quantized_layers, weight_bytes
from megatron_cpt.plan.cost.parameters import count_parameters, norm_size
from megatron_cpt.plan.cost.rank_layout import Layout
from megatron_cpt.plan.hardware import Gpu

GIB = 2**30
MIB = 2**20

# An allowance for the context and the kernels that are loaded into it: a few hundred MiB before the first tensor, which
# `nvidia-smi` shows and torch does not count.
CUDA_CONTEXT_BYTES = 512 * MIB
# NCCL_BUFFSIZE is 4 MiB (NCCL environment variables); a communicator has up to 32 channels, each with a buffer to send
# and one to receive.
NCCL_COMMUNICATOR_BYTES = 2 * 32 * 4 * MIB
# cuBLAS asks for 32 MiB on Hopper and later; torch and Transformer Engine each have a workspace of their own.
CUBLAS_WORKSPACE_BYTES = 2 * 32 * MIB


@dataclass(frozen=True)
class Memory:
    """Bytes on the ranks of one pipeline stage, where they need most.

    Attributes:
        stage: the pipeline stage, from 0.
        weights: in the compute format, and their FP8 or FP4 copies.
        gradients: accumulated over the micro-batches of a step, in fp32.
        optimizer: fp32 master weights (bf16 runs) and both moments of Adam.
        activations: kept for the backward passes of all micro-batches in flight.
        logits: of one micro-batch and of its loss, on the last stage.
        working: gradients inside the layer that is at work (and the layer itself where it is recomputed), as far as
            they need more than the logits, which are gone by then.
        reserved: CUDA context, communication buffers, kernel workspaces; 0 where no GPU is named.
    """

    stage: int
    weights: float
    gradients: float
    optimizer: float
    activations: float
    logits: float
    working: float
    reserved: float

    @property
    def total(self) -> float:
        """All parts, in bytes."""
        states = self.weights + self.gradients + self.optimizer
        return states + self.activations + self.logits + self.working + self.reserved

    def to_dict(self) -> dict[str, float]:
        """The parts in GiB, and the stage they are of."""
        parts = {name: value / GIB for name, value in asdict(self).items() if name != "stage"}
        return {"stage": self.stage, **parts}


def estimate_memory(config: RunConfig, layout: Layout, *, gpu: Gpu | None = None, spec: Spec | None = None) -> Memory:
    """The memory of the pipeline stage that needs most."""
    return max(stage_memories(config, layout, gpu=gpu, spec=spec), key=lambda memory: memory.total)


def stage_memories(
    config: RunConfig, layout: Layout, *, gpu: Gpu | None = None, spec: Spec | None = None
) -> Sequence[Memory]:
    """The memory of every pipeline stage."""
    stages = range(min(config.parallel.pipeline, config.model.layers))  # more are refused, but planned all the same
    return [stage_memory(config, layout, stage, gpu=gpu, spec=spec) for stage in stages]


def stage_memory(
    config: RunConfig, layout: Layout, stage: int, *, gpu: Gpu | None = None, spec: Spec | None = None
) -> Memory:
    """The memory of one pipeline stage.

    Args:
        config: the run.
        layout: how it is laid out.
        stage: the stage, from 0.
        gpu: the GPU it runs on, for what it takes besides tensors.
        spec: the layer spec; left out: `default_spec`.
    """
    spec = spec or default_spec(config)
    parameters = stage_parameters(config, stage)
    is_bf16 = config.precision.compute == "bf16"
    # bf16: a master copy and two moments in fp32; fp32 weights are their own master.
    optimizer = (12 if is_bf16 else 8) * parameters
    if config.parallel.distributed_optimizer:
        optimizer /= layout.data_parallel * config.parallel.context
    weights = (2 if is_bf16 else 4) * parameters
    kind = format_of(config)
    if kind is not None:
        # Transformer Engine keeps them over a step, beside the bf16 weights; with `params` in their place.
        in_place_of = 2 if config.precision.has_fp8_weights else 0
        weights += (weight_bytes(kind, gpu) - in_place_of) * quantized_parameters(config, stage)
    logits = logits_bytes(config) if stage == config.parallel.pipeline - 1 else 0.0
    return Memory(
        stage=stage,
        weights=weights,
        gradients=4 * parameters,
        optimizer=optimizer,
        activations=kept_bytes(config, layout, stage, spec),
        logits=logits,
        working=max(0.0, working_bytes(config, spec) - logits),
        reserved=0.0 if gpu is None else _reserved(config, layout),
    )


def stage_parameters(config: RunConfig, stage: int) -> float:
    """Parameters that a rank of one stage holds: its share of what tensor parallelism splits, and the rest whole."""
    model, parts = config.model, count_parameters(config.model)
    first, last = stage == 0, stage == config.parallel.pipeline - 1
    # Where embedding and head are tied but on different stages, the last stage holds a copy.
    tables = int(first) + int(last and not (model.tied_embeddings and first))
    sharded = layers_of_stage(config) * parts.layer.matmul + tables * model.padded_vocab * model.hidden
    whole = layers_of_stage(config) * (parts.layer.norms + parts.layer.biases) + (norm_size(model) if last else 0)
    return sharded / config.parallel.tensor + whole


def quantized_parameters(config: RunConfig, stage: int) -> float:
    """Those of them that a rank multiplies in FP8 or FP4."""
    return quantized_layers(config, stage) * count_parameters(config.model).layer.matmul / config.parallel.tensor


def _reserved(config: RunConfig, layout: Layout) -> float:
    parallel = config.parallel
    groups = (parallel.tensor, parallel.pipeline, parallel.context, layout.data_parallel, layout.num_gpus)
    communicators = sum(size > 1 for size in groups)  # the last: the norm of the gradients, over all ranks
    fixed = CUDA_CONTEXT_BYTES + CUBLAS_WORKSPACE_BYTES + communicators * NCCL_COMMUNICATOR_BYTES
    return fixed + _user_buffers(config)


def _user_buffers(config: RunConfig) -> float:
    """Bytes of Transformer Engine's buffers for `speed.tp_comm_overlap`, each as large as a micro-batch's residuals.

    There are 8 for gathers, in a byte an element with FP8, and 4 for scatters; as many again in bf16 where some layers
    stay in it (`initialize_ub` in pytorch/module/base.py, Transformer Engine 2.20).
    """
    if "tp_comm_overlap" not in resolve_speed(config, GPU_CLUSTER)[0]:
        return 0.0
    fp8 = config.precision.fp8
    bf16_buffers = 2 * (8 + 4)
    elements = tokens_of_micro_batch(config) * config.model.hidden
    if fp8 is None:
        return bf16_buffers * elements
    return (8 + 2 * 4 + (bf16_buffers if fp8.first_last_bf16 else 0)) * elements
