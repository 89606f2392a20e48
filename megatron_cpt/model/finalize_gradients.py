"""Sum and scale the gradients after the last micro-batch, without waiting for the device."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, finalize_model_grads
from megatron.core.process_groups_config import ProcessGroupCollection


def finalize_gradients(
    chunks: Sequence[DistributedDataParallel],
    num_tokens: torch.Tensor | None = None,
    *,
    pg_collection: ProcessGroupCollection | None = None,
    force_all_reduce: bool = False,
) -> None:
    """Sum the gradients over ranks and divide them by the tokens of the step; a collective call.

    megatron-core calls this after the last backward pass. Its own `finalize_model_grads` asks the host whether there
    are any tokens (0.16.1, `if num_tokens > 0`), which waits for the GPU. So it only sums here.

    Args:
        chunks: model chunks of this rank.
        num_tokens: int (), tokens with a loss that this rank has seen; only the last pipeline stage counts any.
        pg_collection: process groups of the schedule; None: megatron-core's parallel state has them.
        force_all_reduce: as in megatron-core.
    """
    finalize_model_grads(list(chunks), None, pg_collection=pg_collection, force_all_reduce=force_all_reduce)
    if num_tokens is None:
        return
    if pg_collection is not None:
        pipeline, replicas = pg_collection.pp, pg_collection.dp_cp
    else:
        pipeline = parallel_state.get_pipeline_model_parallel_group()
        replicas = parallel_state.get_data_parallel_group(with_context_parallel=True)
    dist.broadcast(num_tokens, src=dist.get_process_group_ranks(pipeline)[-1], group=pipeline)
    dist.all_reduce(num_tokens, group=replicas)
    scale = 1.0 / num_tokens.clamp(min=1)  # without a single token all gradients are 0
    for chunk in chunks:
        chunk.scale_gradients(scale)
