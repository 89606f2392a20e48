"""Devices, process groups, signals and random states. No other package opens a process group."""

from megatron_cpt.backend.deterministic import kernel_settings
from megatron_cpt.backend.distributed import (
    Ranks,
    data_parallel_size,
    launched_rank,
    launched_world_size,
    process_groups,
    second_layout,
)
from megatron_cpt.backend.seeding import rng_state, seed_everything, set_rng_state
from megatron_cpt.backend.signals import StopRequest, own_process

__all__ = [
    "Ranks",
    "StopRequest",
    "data_parallel_size",
    "kernel_settings",
    "launched_rank",
    "launched_world_size",
    "own_process",
    "process_groups",
    "rng_state",
    "second_layout",
    "seed_everything",
    "set_rng_state",
]
