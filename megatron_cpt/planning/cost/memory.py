"""Memory per rank, by part and pipeline stage.

Weights, gradients and optimizer states follow ZeRO (Rajbhandari et al., arXiv 1910.02054); `activations.py` counts the
tensors of forward and backward passes. `reserved`, memory that is not in tensors, is estimated only for a named GPU.

Example: Nemotron-4 15B at TP8 PP4 on one replica holds about 0.59B parameters on stage 0. That is 1.1 GiB of bf16
weights, 2.2 GiB of fp32 gradients and 6.6 GiB of optimizer states (12 bytes per parameter).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

from megatron_cpt.config import RunConfig
from megatron_cpt.config.knobs import GPU_CLUSTER, resolve_speed
from megatron_cpt.planning.cost.activations import (
    Spec,
    default_spec,
    logits_bytes,
    stage_activation_bytes,
    tokens_of_micro_batch,
    working_bytes,
)
from megatron_cpt.planning.cost.formats import format_of, quantized_layers, weight_bytes
from megatron_cpt.planning.cost.parameters import count_parameters, norm_size
from megatron_cpt.planning.cost.rank_layout import Layout, layers_of_stage
from megatron_cpt.planning.cost.teacher_cost import hidden_state_bytes, loss_piece_bytes, teacher_run
from megatron_cpt.planning.hardware import Gpu

GIB = 2**30
MIB = 2**20

# Allowance for the CUDA context with its loaded kernels: a few hundred MiB that `nvidia-smi` shows and torch does not.
CUDA_CONTEXT_BYTES = 512 * MIB
# NCCL_BUFFSIZE is 4 MiB by default; a communicator has up to 32 channels with a send and a receive buffer each.
NCCL_COMMUNICATOR_BYTES = 2 * 32 * 4 * MIB
# cuBLAS needs 32 MiB on Hopper and later; torch and Transformer Engine have one workspace each.
CUBLAS_WORKSPACE_BYTES = 2 * 32 * MIB


@dataclass(frozen=True)
class Memory:
    """Peak bytes per rank of one pipeline stage.

    Attributes:
        stage: the pipeline stage, from 0.
        weights: in the compute format, and their FP8 or FP4 copies.
        gradients: fp32 gradients, accumulated over the micro-batches of a step.
        optimizer: fp32 master weights (bf16 runs) and both moments of Adam.
        activations: saved for the backward passes of all micro-batches in flight.
        logits: of one micro-batch with its loss, on the last stage.
        working: gradients inside the layer that runs backward, and its recomputed activations, as far as they exceed
            the logits, which are freed before.
        teacher: weights of a teacher, its hidden states, and its part of the loss; 0 without distillation.
        reserved: CUDA context, communication buffers, kernel workspaces; 0 without a named GPU.
    """

    stage: int
    weights: float
    gradients: float
    optimizer: float
    activations: float
    logits: float
    working: float
    teacher: float
    reserved: float

    @property
    def total(self) -> float:
        """Sum of all parts in bytes."""
        states = self.weights + self.gradients + self.optimizer
        return states + self.activations + self.logits + self.working + self.teacher + self.reserved

    def to_dict(self) -> dict[str, float]:
        """Return the stage, and its parts in GiB."""
        return {name: value if name == "stage" else value / GIB for name, value in asdict(self).items()}


def stage_memories(config: RunConfig, layout: Layout, *, gpu: Gpu | None = None) -> Sequence[Memory]:
    """Return the memory of every pipeline stage."""
    # More stages than layers, embedding and head are refused later; the plan is built to report problems together.
    stages = range(min(config.parallel.pipeline, config.model.layers + 2))
    return [stage_memory(config, layout, stage, gpu=gpu) for stage in stages]


def stage_memory(
    config: RunConfig, layout: Layout, stage: int, *, gpu: Gpu | None = None, spec: Spec | None = None
) -> Memory:
    """Return the memory of one pipeline stage; without `gpu`, `reserved` is 0; `spec=None` means `default_spec`."""
    spec = spec or default_spec(config)
    parameters = stage_parameters(config, stage)
    is_bf16 = config.precision.compute == "bf16"
    # bf16: fp32 master weights and two moments, 4 bytes each; fp32 weights need no master copy.
    optimizer = ((4 if is_bf16 else 0) + 2 * (2 if config.optimizer.moments == "bf16" else 4)) * parameters
    if config.parallel.distributed_optimizer:
        optimizer /= layout.data_parallel * config.parallel.context
    weights = (2 if is_bf16 else 4) * parameters
    kind = format_of(config)
    if kind is not None:
        # Transformer Engine stores them during a step, in addition to the bf16 weights or, with `params`, instead.
        replaced = 2 if config.precision.has_fp8_weights else 0
        weights += (weight_bytes(kind, gpu) - replaced) * quantized_parameters(config, stage)
    is_last = stage == config.parallel.pipeline - 1
    logits = logits_bytes(config) if is_last else 0.0
    return Memory(
        stage=stage,
        weights=weights,
        gradients=4 * parameters,
        optimizer=optimizer,
        activations=stage_activation_bytes(config, layout, stage, spec),
        logits=logits,
        working=max(0.0, working_bytes(config, stage, spec) - logits),
        teacher=_teacher(config, layout, stage, is_last=is_last),
        reserved=0.0 if gpu is None else _reserved(config, layout),
    )


def _teacher(config: RunConfig, layout: Layout, stage: int, *, is_last: bool) -> float:
    run = teacher_run(config)
    weights = 0.0
    if run is not None and run.parallel.pipeline == config.parallel.pipeline:
        weights = stage_parameters(run, stage)
    elif run is not None and is_last:  # its ranks run the whole teacher
        weights = stage_parameters(run, 0)
    weights *= 2 if config.precision.compute == "bf16" else 4
    return weights + (loss_piece_bytes(config) + hidden_state_bytes(config, layout) if is_last else 0.0)


def stage_parameters(config: RunConfig, stage: int) -> float:
    """Return the parameters per rank of one stage: its shard of split tensors, and all of the other tensors."""
    model, parts = config.model, count_parameters(config.model)
    first, last = stage == 0, stage == config.parallel.pipeline - 1
    # If embedding and head share weights but are on different stages, the last stage has a copy.
    tables = int(first) + int(last and not (model.tied_embeddings and first))
    layers = layers_of_stage(config, stage)
    sharded = layers * parts.layer.matmul + tables * model.padded_vocab * model.hidden
    whole = layers * (parts.layer.norms + parts.layer.biases) + (norm_size(model) if last else 0)
    return sharded / config.parallel.tensor + whole


def quantized_parameters(config: RunConfig, stage: int) -> float:
    """Return the parameters per rank of one stage that are multiplied in FP8 or FP4."""
    return quantized_layers(config, stage) * count_parameters(config.model).layer.matmul / config.parallel.tensor


def _reserved(config: RunConfig, layout: Layout) -> float:
    parallel = config.parallel
    groups = (parallel.tensor, parallel.pipeline, parallel.context, layout.data_parallel, layout.num_gpus)
    communicators = sum(size > 1 for size in groups)  # all ranks share one for the gradient norm
    fixed = CUDA_CONTEXT_BYTES + CUBLAS_WORKSPACE_BYTES + communicators * NCCL_COMMUNICATOR_BYTES
    return fixed + _user_buffers(config)


def _user_buffers(config: RunConfig) -> float:
    """Return the bytes of Transformer Engine's buffers for `speed.tp_comm_overlap`.

    Each has one element per token and hidden unit of a micro-batch. 8 buffers gather, with one byte per element in FP8;
    4 scatter in bf16. Layers that stay in bf16 have another 12 in bf16 (`initialize_ub` in pytorch/module/base.py,
    Transformer Engine 2.20).
    """
    if "tp_comm_overlap" not in resolve_speed(config, GPU_CLUSTER)[0]:
        return 0.0
    fp8 = config.precision.fp8
    bf16_buffers = 2 * (8 + 4)
    elements = tokens_of_micro_batch(config) * config.model.hidden
    if fp8 is None:
        return bf16_buffers * elements
    return (8 + 2 * 4 + (bf16_buffers if fp8.first_last_bf16 else 0)) * elements
