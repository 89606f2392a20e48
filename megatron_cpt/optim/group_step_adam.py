"""Adam with the state layout of FusedAdam (Apex, Transformer Engine), on torch's own fused kernels.

megatron-core's distributed optimizer is written for FusedAdam, which keeps moments per parameter and one step count
per group. Without these libraries megatron-core falls back to torch's AdamW, which keeps a step count per parameter.
Then a reshardable checkpoint neither saves (`assert len(steps) == 1`) nor loads (`KeyError: 'step'`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch.optim.adamw import adamw


class GroupStepAdam(torch.optim.Optimizer):
    """Adam with decoupled weight decay (AdamW, arXiv 1711.05101); one step count per parameter group.

    Args:
        params: parameters or groups; gradients are in `p.grad` and have the dtype of the parameter.
        lr, betas, eps, weight_decay: as in torch.optim.AdamW.
        adam_w_mode, bias_correction, capturable: FusedAdam's arguments; only the defaults are supported.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        bias_correction: bool = True,
        adam_w_mode: bool = True,
        capturable: bool = False,
    ) -> None:
        assert bias_correction, "Adam without bias correction is not supported"
        assert adam_w_mode, "only decoupled weight decay is supported"
        assert not capturable, "CUDA graphs are not supported"
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "bias_correction": True}
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        assert closure is None, "closures are not supported"
        for group in self.param_groups:
            # Also for groups without parameters on this rank: step counts must be equal over ranks and groups.
            group["step"] = group.get("step", 0) + 1
            parameters = [p for p in group["params"] if p.grad is not None]
            if parameters:
                self._update(group, parameters)

    def _update(self, group: dict[str, Any], parameters: list[torch.Tensor]) -> None:
        for parameter in parameters:
            if not self.state[parameter]:
                self.state[parameter]["exp_avg"] = torch.zeros_like(parameter)
                self.state[parameter]["exp_avg_sq"] = torch.zeros_like(parameter)
        previous = float(group["step"] - 1)  # the kernel adds 1
        # One kernel that gets the number as an argument. A copy per parameter would make the host wait for the GPU.
        steps = torch.full((len(parameters),), previous, device=parameters[0].device).unbind()
        adamw(
            parameters,
            [parameter.grad for parameter in parameters],  # type: ignore[misc]
            [self.state[parameter]["exp_avg"] for parameter in parameters],
            [self.state[parameter]["exp_avg_sq"] for parameter in parameters],
            [],
            list(steps),
            fused=True,
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )


def install_if_needed() -> bool:
    """Let megatron-core use `GroupStepAdam` in place of FusedAdam, unless it has found a FusedAdam.

    Returns:
        Whether megatron-core now uses it.
    """
    import megatron.core.optimizer as mcore_optimizer
    from megatron.core.optimizer import distrib_optimizer

    if not mcore_optimizer.USING_PYTORCH_OPTIMIZER and mcore_optimizer.Adam is not GroupStepAdam:
        return False
    mcore_optimizer.Adam = GroupStepAdam
    mcore_optimizer.USING_PYTORCH_OPTIMIZER = False
    distrib_optimizer.Adam = GroupStepAdam
    distrib_optimizer.HAVE_APEX_OR_TE = True
    distrib_optimizer.USING_APEX_OPTIMIZER = True
    return True
