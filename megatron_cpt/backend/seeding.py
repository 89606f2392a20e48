"""Random states: one seed of the run -> torch's and megatron-core's generators, saved as plain byte tensors."""

from __future__ import annotations

import torch


def seed_everything(seed: int, *, pipeline_rank: int) -> None:
    """Seed this rank.

    Tensor-parallel ranks share the default generator, so that every one makes the same whole weight and keeps its
    part: initial weights do not depend on tensor parallelism. Pipeline stages differ, as in Megatron-LM
    (seed + 100 x stage). Dropout inside tensor-parallel regions has megatron-core's tracker.
    """
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    stage_seed = seed + 100 * pipeline_rank
    torch.manual_seed(stage_seed)
    model_parallel_cuda_manual_seed(stage_seed, force_reset_rng=True)


def rng_state() -> dict[str, torch.Tensor]:
    """Copies of the states of all generators of this rank by name, each a byte tensor."""
    from megatron.core.tensor_parallel.random import get_cuda_rng_tracker

    states = {"torch": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    for name, state in get_cuda_rng_tracker().get_states().items():
        states[f"tracker.{name}"] = state
    return {name: state.to("cpu", torch.uint8, copy=True) for name, state in states.items()}


def set_rng_state(states: dict[str, torch.Tensor]) -> None:
    """Put back what `rng_state` returned."""
    from megatron.core.tensor_parallel.random import get_cuda_rng_tracker

    torch.set_rng_state(states["torch"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])
    prefix = "tracker."
    tracked = {name.removeprefix(prefix): state for name, state in states.items() if name.startswith(prefix)}
    get_cuda_rng_tracker().set_states(tracked)
