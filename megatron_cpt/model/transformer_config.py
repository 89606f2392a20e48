"""Translate the model, parallel, precision and recompute sections of run.yaml to TransformerConfig."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from torch.nn import functional

from megatron_cpt.config import Activation, ModelConfig, Norm, ParallelConfig, PrecisionConfig, RecomputeConfig
from megatron_cpt.model.kernel_options import Knobs, transformer_fields


def squared_relu(x: torch.Tensor) -> torch.Tensor:
    """Return relu(x)^2, the activation of Nemotron (Primer, arXiv 2109.08668)."""
    return torch.square(functional.relu(x))


def gelu_tanh(x: torch.Tensor) -> torch.Tensor:
    """Return the tanh approximation of GELU."""
    return functional.gelu(x, approximate="tanh")


def skip_initialization(weight: torch.Tensor) -> torch.Tensor:
    """Return the weight unchanged; megatron-core's init methods have this signature."""
    return weight


_ACTIVATIONS: dict[Activation, Callable[[torch.Tensor], torch.Tensor]] = {
    Activation.SQUARED_RELU: squared_relu,
    Activation.SILU: functional.silu,
    Activation.GELU: functional.gelu,
    Activation.GELU_TANH: gelu_tanh,
}


def params_dtype(precision: PrecisionConfig) -> torch.dtype:
    """Return the type of the weights in the forward pass."""
    return torch.bfloat16 if precision.compute == "bf16" else torch.float32


def transformer_config(
    model: ModelConfig,
    parallel: ParallelConfig,
    precision: PrecisionConfig,
    recompute: RecomputeConfig,
    knobs: Knobs = (),
) -> TransformerConfig:
    """Build the configuration of one model for one layout and precision."""
    activation = _ACTIVATIONS[model.activation]
    return TransformerConfig(
        **_shape(model),
        **_parallel(parallel, params_dtype(precision)),
        **_precision(precision),
        **_recompute(recompute),
        **transformer_fields(knobs, model, activation),
    )


def _shape(model: ModelConfig) -> dict[str, Any]:
    return {
        "num_layers": model.layers,
        "hidden_size": model.hidden,
        "ffn_hidden_size": model.ffn_hidden,
        "num_attention_heads": model.heads,
        "num_query_groups": model.num_kv_groups,
        "kv_channels": model.head_size,
        "gated_linear_unit": model.gated,
        "normalization": "RMSNorm" if model.norm is Norm.RMSNORM else "LayerNorm",
        "layernorm_zero_centered_gamma": model.norm is Norm.LAYERNORM1P,
        "layernorm_epsilon": model.norm_eps,
        "add_bias_linear": model.linear_bias,
        "add_qkv_bias": model.qkv_bias,
        "qk_layernorm": model.qk_norm,
        "hidden_dropout": model.hidden_dropout,
        "attention_dropout": model.attention_dropout,
        "init_method_std": model.init_std,
        # model/initialize.py draws the random weights. `perform_initialization=False` would skip megatron-core's too,
        # but also the attributes of tensor-parallel weights, without which the gradient norm covers one rank's shards.
        "init_method": skip_initialization,
        "output_layer_init_method": skip_initialization,
        "embedding_init_method": skip_initialization,
        "use_cpu_initialization": not torch.cuda.is_available(),
        "calculate_per_token_loss": True,
    }


def _parallel(parallel: ParallelConfig, dtype: torch.dtype) -> dict[str, Any]:
    is_interleaved = parallel.virtual_pipeline > 1
    return {
        "tensor_model_parallel_size": parallel.tensor,
        "pipeline_model_parallel_size": parallel.pipeline,
        "virtual_pipeline_model_parallel_size": parallel.virtual_pipeline if is_interleaved else None,
        "context_parallel_size": parallel.context,
        "sequence_parallel": parallel.sequence and parallel.tensor > 1,
        "pipeline_dtype": dtype,
        # With two stages, a batched exchange of the interleaved schedule has two messages between the same two ranks
        # and swaps them silently. Megatron-LM uses overlapped single messages for every interleaved schedule.
        "overlap_p2p_comm": is_interleaved,
        "batch_p2p_comm": not is_interleaved,
        "batch_p2p_sync": False,  # works around a race of old releases of torch by waiting for the device
        # A sent output is needed for its autograd graph only, so its memory is freed. The interleaved schedule frees it
        # before the overlapped message is sent: gloo, and NCCL without `record_stream`, would send other data.
        "deallocate_pipeline_outputs": not is_interleaved,
    }


def _precision(precision: PrecisionConfig) -> dict[str, Any]:
    fields: dict[str, Any] = {"bf16": precision.compute == "bf16", "params_dtype": params_dtype(precision)}
    fp8 = precision.fp8
    if fp8 is not None and fp8.backend == "transformer_engine":
        fields |= {"fp8": fp8.format, "fp8_recipe": fp8.recipe, "fp8_param": fp8.params}
        if fp8.recipe == "delayed":
            fields |= {
                "fp8_amax_history_len": fp8.amax_history,
                "fp8_amax_compute_algo": fp8.amax_compute,
                "fp8_margin": fp8.margin,
            }
        fields |= _ends_in_bf16(fp8.first_last_bf16)
    if precision.fp4 is not None:
        # E2M1 is the only 4-bit type; the recipe defines its scaling.
        fields |= {"fp4": "e2m1", "fp4_recipe": precision.fp4.recipe, **_ends_in_bf16(precision.fp4.first_last_bf16)}
    return fields


def _ends_in_bf16(num_layers: int) -> dict[str, Any]:
    if num_layers == 0:
        return {}
    return {
        "first_last_layers_bf16": True,
        "num_layers_at_start_in_bf16": num_layers,
        "num_layers_at_end_in_bf16": num_layers,
    }


def _recompute(recompute: RecomputeConfig) -> dict[str, Any]:
    if recompute.granularity == "none":
        return {}
    if recompute.granularity == "selective":
        return {"recompute_granularity": "selective"}
    return {
        "recompute_granularity": "full",
        "recompute_method": recompute.method,
        "recompute_num_layers": recompute.num_layers,
    }


def output_std(model: ModelConfig) -> float:
    """Return the initial standard deviation of layers that write to the residual stream (GPT-2's scaling)."""
    return model.init_std / math.sqrt(2.0 * model.layers)
