"""The knobs that are on -> megatron-core's settings; which are on and why says the table in config/speed.py."""

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
    """Which knobs are on for a run on this machine.

    Args:
        run: the run.
        machine: where it computes.
        transformer_engine: whether its layers are Transformer Engine's.

    Raises:
        UserError: `speed` asks for what cannot be had here.
    """
    place = ComputePlace(on_gpu=machine.device is not None, transformer_engine=transformer_engine, apex=machine.apex)
    on, problems = resolve_speed(run, place)
    if problems:
        raise UserError("; ".join(problems))
    return on


def transformer_fields(knobs: Knobs, model: ModelConfig, activation: Any) -> dict[str, Any]:
    """Fields of TransformerConfig.

    Args:
        knobs: those that are on.
        model: the model.
        activation: its activation function.
    """
    # megatron-core's fused GELU is the tanh approximation whatever was asked for, so SwiGLU alone goes through it.
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
    """Fields of DistributedDataParallelConfig."""
    return {
        "use_distributed_optimizer": parallel.distributed_optimizer,
        "overlap_grad_reduce": "overlap_grad_reduce" in knobs,
        "overlap_param_gather": "overlap_param_gather" in knobs,
    }


def connect_schedule(chunks: Sequence[DistributedDataParallel], config: TransformerConfig, knobs: Knobs) -> None:
    """Let the pipeline schedule hold back the exchange of gradients until the last micro-batch."""
    if "overlap_grad_reduce" in knobs:
        held = [chunk.no_sync for chunk in chunks]
        config.no_sync_func = held if len(held) > 1 else held[0]


def gather_weights(chunks: Sequence[DistributedDataParallel]) -> None:
    """Bring every weight up to date on every rank, before somebody reads it outside of a forward pass; collective.

    With `overlap_param_gather` an update leaves each rank with its own share of the new weights; the next forward pass
    gathers the rest.
    """
    for chunk in chunks:
        if chunk.ddp_config.overlap_param_gather:
            chunk.start_param_sync(force_sync=True)


def initialize_user_buffers(run: RunConfig, knobs: Knobs) -> None:
    """Make the buffers that Transformer Engine overlaps tensor-parallel communication with; a collective call.

    Raises:
        UserError: the devices cannot do it.
    """
    if "tp_comm_overlap" not in knobs:
        return
    from transformer_engine.pytorch.module import base

    tokens = run.seq_length * run.batch.micro // run.parallel.context
    is_fp8 = run.precision.fp8 is not None
    options: dict[str, Any] = {"use_fp8": is_fp8}
    if hasattr(base, "UserBufferQuantizationMode"):  # from 2.8 on
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
        raise UserError(f"speed.tp_comm_overlap: {first_line}; leave it out here") from error
