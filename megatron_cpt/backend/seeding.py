"""Random number generators of torch and megatron-core: seed them, and copy their states for a checkpoint."""

from __future__ import annotations

import torch


def seed_everything(seed: int, *, pipeline_rank: int) -> None:
    """Seed this rank's generators.

    As in Megatron-LM the seed is `seed + 100 * pipeline_rank`: the same on all tensor-parallel ranks, different per
    pipeline stage. Dropout inside tensor-parallel regions uses megatron-core's tracker, which differs per rank.
    """
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    stage_seed = seed + 100 * pipeline_rank
    torch.manual_seed(stage_seed)
    model_parallel_cuda_manual_seed(stage_seed, force_reset_rng=True)


def rng_state() -> dict[str, torch.Tensor]:
    """Copy the states of all generators of this rank; each is a tensor of bytes."""
    from megatron.core.tensor_parallel.random import get_cuda_rng_tracker

    states = {"torch": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    for name, state in get_cuda_rng_tracker().get_states().items():
        states[f"tracker.{name}"] = state
    return {name: state.to("cpu", torch.uint8, copy=True) for name, state in states.items()}


def set_rng_state(states: dict[str, torch.Tensor]) -> None:
    """Restore the states that `rng_state` returned."""
    from megatron.core.tensor_parallel.random import get_cuda_rng_tracker

    torch.set_rng_state(states["torch"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])
    prefix = "tracker."
    tracked = {name.removeprefix(prefix): state for name, state in states.items() if name.startswith(prefix)}
    get_cuda_rng_tracker().set_states(tracked)
