"""Baseline of the GPU measurements: a minimal training loop on megatron-core alone.

Layers and fused kernels are the fastest that megatron-core has on the machine. Its own attention without Transformer
Engine stores the score matrix, which is neither fast nor fits at this length, so there both loops use torch's fused
attention.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from typing import Any

import torch

from megatron_cpt.config import RunConfig


def bare_steps(run: RunConfig, batches: list[Any]) -> Callable[[], None]:
    """Return a training step on megatron-core alone, with batches already on the device."""
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
    from megatron.core.pipeline_parallel import get_forward_backward_func
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
    from megatron.core.transformer.module import Float16Module

    from megatron_cpt.optim.group_step_adam import install_if_needed

    model_parallel_cuda_manual_seed(run.seed)
    install_if_needed()  # without Apex and Transformer Engine, both loops use the same Adam
    config, model = _model(run)
    ddp_config = DistributedDataParallelConfig(grad_reduce_in_fp32=True, use_distributed_optimizer=True)
    chunk = DistributedDataParallel(config, ddp_config, Float16Module(config, model))
    config.finalize_model_grads_func = finalize_model_grads
    adam = OptimizerConfig(
        optimizer="adam", lr=1e-5, bf16=True, params_dtype=torch.bfloat16, use_distributed_optimizer=True
    )
    optimizer = get_megatron_optimizer(adam, [chunk])
    device = torch.cuda.current_device()
    tensors = [
        [torch.from_numpy(x).to(device) for x in (batch.tokens, batch.position_ids, batch.labels)] for batch in batches
    ]
    schedule = get_forward_backward_func()

    def forward_step(iterator: Iterator[Any], model: Any) -> Any:
        tokens, positions, labels = next(iterator)
        losses = model(tokens, positions, None, labels=labels)
        return losses, lambda output: (output.float().mean(), {})

    def step() -> None:
        chunk.zero_grad_buffer()
        optimizer.zero_grad()
        schedule(
            forward_step_func=forward_step,
            data_iterator=iter(tensors),
            model=[chunk],
            num_microbatches=len(tensors),
            seq_length=run.seq_length,
            micro_batch_size=run.batch.micro,
            forward_only=False,
        )
        optimizer.step()

    return step


def describe_layers() -> str:
    """Return the layers and the attention kernel of the bare loop on this machine."""
    from megatron_cpt.model.capabilities import read_machine

    if read_machine().transformer_engine is not None:
        return "megatron-core with Transformer Engine"
    return "megatron-core's local layers with torch's scaled_dot_product_attention in place of their own attention"


def _model(run: RunConfig) -> tuple[Any, Any]:
    from megatron.core.activations import squared_relu
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import (
        get_gpt_layer_local_spec,
        get_gpt_layer_with_transformer_engine_spec,
    )
    from megatron.core.transformer.transformer_config import TransformerConfig

    from megatron_cpt.model.capabilities import read_machine
    from megatron_cpt.model.local_modules import LocalAttention

    here = read_machine()
    has_te = here.transformer_engine is not None
    shape, fp8 = run.model, run.precision.fp8
    low = {} if fp8 is None else {"fp8": fp8.format, "fp8_recipe": fp8.recipe}
    if fp8 is not None and fp8.recipe == "delayed":
        low |= {"fp8_amax_history_len": fp8.amax_history, "fp8_amax_compute_algo": fp8.amax_compute}
    config = TransformerConfig(
        num_layers=shape.layers,
        hidden_size=shape.hidden,
        ffn_hidden_size=shape.ffn_hidden,
        num_attention_heads=shape.heads,
        num_query_groups=shape.num_kv_groups,
        kv_channels=shape.head_size,
        activation_func=squared_relu,
        # megatron-core's local norm does not support zero-centered weights
        layernorm_zero_centered_gamma=has_te,
        add_bias_linear=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        bf16=True,
        params_dtype=torch.bfloat16,
        pipeline_dtype=torch.bfloat16,
        use_cpu_initialization=here.device is None,
        bias_dropout_fusion=here.device is not None,
        apply_rope_fusion=has_te,
        gradient_accumulation_fusion=importlib.util.find_spec("fused_weight_gradient_mlp_cuda") is not None,  # Apex
        cross_entropy_loss_fusion=True,
        **low,
    )
    if has_te:
        spec = get_gpt_layer_with_transformer_engine_spec()
    else:
        spec = get_gpt_layer_local_spec()
        spec.submodules.self_attention.submodules.core_attention = LocalAttention
    model = GPTModel(
        config,
        spec,
        vocab_size=shape.padded_vocab,
        max_sequence_length=run.seq_length,
        position_embedding_type="rope",
        rotary_percent=shape.rotary_percent,
        share_embeddings_and_output_weights=False,
    )
    return config, model.to(torch.cuda.current_device())
