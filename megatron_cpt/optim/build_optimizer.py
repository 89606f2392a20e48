"""megatron-core's optimizer for a run, and the settings that change in it from step to step."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig, get_megatron_optimizer

from megatron_cpt.config import OptimizerConfig as AdamConfig
from megatron_cpt.config import ParallelConfig, PrecisionConfig, ScheduleConfig
from megatron_cpt.optim.group_step_adam import bf16_moments, install_if_needed


def build_optimizer(
    adam: AdamConfig,
    schedule: ScheduleConfig,
    parallel: ParallelConfig,
    precision: PrecisionConfig,
    chunks: Sequence[DistributedDataParallel],
) -> MegatronOptimizer:
    """Build Adam for the model chunks, with fp32 master weights under bf16 and optional sharding over replicas.

    megatron-core's parameter groups exclude biases and norms from weight decay.
    """
    install_if_needed()
    bf16 = precision.compute == "bf16"
    fp8 = precision.fp8 if precision.uses_transformer_engine else None
    config = OptimizerConfig(
        optimizer="adam",
        # Saved with the parameter groups, where megatron-core's scheduler looks them up. Here `Update` sets the rate.
        lr=schedule.max_lr,
        min_lr=schedule.min_lr,
        weight_decay=adam.weight_decay,
        adam_beta1=adam.betas[0],
        adam_beta2=adam.betas[1],
        adam_eps=adam.eps,
        clip_grad=adam.clip_grad,
        bf16=bf16,
        params_dtype=torch.bfloat16 if bf16 else torch.float32,
        use_distributed_optimizer=parallel.distributed_optimizer,
        fp8_recipe=fp8.recipe if fp8 is not None else None,
        reuse_grad_buf_for_mxfp8_param_ag=fp8 is not None and fp8.params and fp8.recipe == "mxfp8",
    )
    with bf16_moments(adam.moments == "bf16"):
        optimizer = get_megatron_optimizer(config, list(chunks))
    for chunk in chunks:
        chunk.config.grad_scale_func = optimizer.scale_loss
    return optimizer


def set_adam(optimizer: MegatronOptimizer, adam: AdamConfig) -> None:
    """Set Adam's betas and epsilon; loading an optimizer replaces them by the saved ones."""
    for group in optimizer.param_groups:
        group["betas"], group["eps"] = tuple(adam.betas), adam.eps
