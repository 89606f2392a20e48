"""Translate the `speed` knobs to megatron-core's settings; config/knobs.py decides which knobs are on."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

from megatron.core.distributed import DistributedDataParallel
from megatron.core.jit import jit_fuser
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_cpt.config import Activation, ModelConfig, ParallelConfig, RunConfig
from megatron_cpt.config.knobs import ComputePlace, resolve_speed
from megatron_cpt.errors import UserError
from megatron_cpt.model.capabilities import Machine

Knobs = Collection[str]
"""Names of the knobs that are on."""


def choose_knobs(run: RunConfig, machine: Machine, *, transformer_engine: bool) -> frozenset[str]:
    """Return the knobs that are on for a run on this machine, whose layers may be Transformer Engine's.

    Raises:
        UserError: a `speed` setting is not supported here.
    """
    place = ComputePlace(
        on_gpu=machine.device is not None, transformer_engine=transformer_engine, adds_gradients=machine.adds_gradients
    )
    on, problems = resolve_speed(run, place)
    if problems:
        raise UserError("; ".join(problems))
    return on


def transformer_fields(knobs: Knobs, model: ModelConfig, activation: Any) -> dict[str, Any]:
    """Return the fields of TransformerConfig that depend on knobs."""
    # megatron-core's fused GELU is always the tanh approximation, so only SwiGLU uses the fused kernel.
    has_kernel = model.gated and model.activation is Activation.SILU
    fuses = "fused_activation" in knobs
    return {
        "activation_func": jit_fuser(activation) if fuses and not has_kernel else activation,
        "bias_activation_fusion": fuses and has_kernel,
        "bias_dropout_fusion": "fused_bias_dropout" in knobs,
        "apply_rope_fusion": "fused_rope" in knobs,
        "gradient_accumulation_fusion": "fused_grad_accumulation" in knobs,
        "cross_entropy_loss_fusion": "fused_cross_entropy" in knobs,
        # `te` has been wrong in several releases, up to gradients of zero (NVIDIA/Megatron-LM issue 1750, PR 5115).
        "cross_entropy_fusion_impl": "native",
        "tp_comm_overlap": "tp_comm_overlap" in knobs,
    }


def ddp_fields(knobs: Knobs, parallel: ParallelConfig) -> dict[str, Any]:
    """Return the fields of DistributedDataParallelConfig that depend on knobs."""
    return {
        "use_distributed_optimizer": parallel.distributed_optimizer,
        "overlap_grad_reduce": "overlap_grad_reduce" in knobs,
        "overlap_param_gather": "overlap_param_gather" in knobs,
    }


def connect_schedule(chunks: Sequence[DistributedDataParallel], config: TransformerConfig, knobs: Knobs) -> None:
    """Make the pipeline schedule delay the gradient reduction to the last micro-batch, for `overlap_grad_reduce`."""
    if "overlap_grad_reduce" in knobs:
        contexts = [chunk.no_sync for chunk in chunks]
        config.no_sync_func = contexts if len(contexts) > 1 else contexts[0]


def gather_weights(chunks: Sequence[DistributedDataParallel]) -> None:
    """Gather the updated weights on every rank before they are read outside a forward pass; a collective call.

    With `overlap_param_gather` a rank holds only its own shard of the new weights after an update, until the next
    forward pass gathers the others.
    """
    for chunk in chunks:
        if chunk.ddp_config.overlap_param_gather:
            chunk.start_param_sync(force_sync=True)


def initialize_user_buffers(run: RunConfig, knobs: Knobs) -> None:
    """Create Transformer Engine's buffers for overlapped tensor-parallel communication; a collective call.

    Raises:
        UserError: the devices do not support it.
    """
    if "tp_comm_overlap" not in knobs:
        return
    from transformer_engine.pytorch.module import base

    tokens = run.seq_length * run.batch.micro // run.parallel.context
    is_fp8 = run.precision.fp8 is not None
    options: dict[str, Any] = {"use_fp8": is_fp8}
    if hasattr(base, "UserBufferQuantizationMode"):  # Transformer Engine 2.8 and newer
        modes = base.UserBufferQuantizationMode
        has_bf16_layers = run.precision.fp8 is not None and run.precision.fp8.first_last_bf16 > 0
        kinds = [modes.FP8] if is_fp8 else [modes.NONE]
        options = {"quantization_modes": [*kinds, modes.NONE] if has_bf16_layers else kinds}
    try:
        base.initialize_ub(
            shape=[tokens, run.model.hidden],
            tp_size=run.parallel.tensor,
            ub_cfgs=None,
            bootstrap_backend="nccl",
            **options,
        )
    except RuntimeError as error:
        first_line = str(error).strip().splitlines()[0]
        raise UserError(f"speed.tp_comm_overlap: {first_line}; set it to false on this machine") from error
