"""Optional behavior of the loop, one hook a file."""

from __future__ import annotations

from megatron_cpt.config import RunConfig
from megatron_cpt.train.hook import Hook


def build_hooks(config: RunConfig) -> list[Hook]:
    """The hooks that a run asks for, in the order in which they are called."""
    from megatron_cpt.hooks.anomalies_file import AnomaliesFile
    from megatron_cpt.hooks.console import ConsoleHook
    from megatron_cpt.hooks.metrics_file import MetricsFile

    hooks: list[Hook] = [MetricsFile(), AnomaliesFile(), ConsoleHook()]
    if config.resilience.straggler:
        from megatron_cpt.hooks.resiliency import StragglerHook

        hooks.append(StragglerHook())
    if config.log.tensorboard:
        from megatron_cpt.hooks.tensorboard import TensorBoardHook

        hooks.append(TensorBoardHook())
    if config.log.wandb is not None:
        from megatron_cpt.hooks.wandb import WandbHook

        hooks.append(WandbHook(config.log.wandb))
    return hooks
