"""The megatron-core optimizer of a run, and the two numbers that change in it from step to step."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig, get_megatron_optimizer

from megatron_cpt.config import OptimizerConfig as AdamConfig
from megatron_cpt.config import ParallelConfig, PrecisionConfig
from megatron_cpt.optim.group_step_adam import install_if_needed


def build_optimizer(
    adam: AdamConfig,
    parallel: ParallelConfig,
    precision: PrecisionConfig,
    chunks: Sequence[DistributedDataParallel],
) -> MegatronOptimizer:
    """Adam over the chunks: fp32 master weights under bf16, sharded over data-parallel ranks where asked.

    Biases and norms get no weight decay (megatron-core's parameter groups).
    """
    install_if_needed()
    bf16 = precision.compute == "bf16"
    fp8 = precision.fp8 if precision.uses_transformer_engine else None
    config = OptimizerConfig(
        optimizer="adam",
        # Not the run's rate, which `set_rate` gives at every step: megatron-core tells parameter groups in a checkpoint
        # apart by these two, so an optimizer could not be loaded into a run with another schedule.
        lr=1.0,
        min_lr=0.0,
        weight_decay=adam.weight_decay,
        adam_beta1=adam.betas[0],
        adam_beta2=adam.betas[1],
        adam_eps=adam.eps,
        clip_grad=adam.clip_grad,
        bf16=bf16,
        params_dtype=torch.bfloat16 if bf16 else torch.float32,
        use_distributed_optimizer=parallel.distributed_optimizer,
        # How weights in FP8 are made from their fp32 masters.
        fp8_recipe=fp8.recipe if fp8 is not None else None,
        reuse_grad_buf_for_mxfp8_param_ag=fp8 is not None and fp8.params and fp8.recipe == "mxfp8",
    )
    optimizer = get_megatron_optimizer(config, list(chunks))
    for chunk in chunks:
        chunk.config.grad_scale_func = optimizer.scale_loss
    return optimizer


def set_adam(optimizer: MegatronOptimizer, adam: AdamConfig) -> None:
    """Set Adam's betas and epsilon, which loading an optimizer's state replaces by those that were saved with it."""
    for group in optimizer.param_groups:
        group["betas"], group["eps"] = tuple(adam.betas), adam.eps


def set_rate(optimizer: MegatronOptimizer, rate: float, weight_decay: float) -> None:
    """Set the learning rate and weight decay of the coming step.

    Always from the schedule, never from what a checkpoint carried: a continued run must not inherit old values
    (NVIDIA/Megatron-LM issues 963 and 1533).
    """
    for group in optimizer.param_groups:
        group["lr"] = rate * group.get("lr_mult", 1.0)
        group["weight_decay"] = weight_decay * group.get("wd_mult", 1.0)
