"""Collective calls for work that may fail on one rank: either every rank gets a result, or every rank raises.

If one rank raised alone, the other ranks would wait for it in their next collective.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
import torch.distributed as dist

from megatron_cpt.errors import CptError, RefusedError

T = TypeVar("T")


def on_main(work: Callable[[], T]) -> T:
    """Run a function on rank 0 and return its result on all ranks; a collective call.

    Raises:
        CptError: on all ranks, if the function raised it.
        RefusedError: on all ranks, if the function raised OSError.
    """
    outcome: list[tuple[T | None, CptError | None]] = [(None, None)]
    if dist.get_rank() == 0:
        try:
            outcome = [(work(), None)]
        except CptError as error:
            outcome = [(None, error)]
        except OSError as error:
            outcome = [(None, RefusedError(str(error)))]
    dist.broadcast_object_list(outcome, src=0)
    result, failure = outcome[0]
    if failure is not None:
        raise failure
    return result  # type: ignore[return-value]  # None only beside a failure


def on_all(work: Callable[[], T]) -> T:
    """Run a function on every rank and return this rank's result; a collective call.

    Raises:
        RefusedError: on all ranks, if the function raised RefusedError or OSError on any; with all reasons.
    """
    result, failure = None, None
    try:
        result = work()
    except (RefusedError, OSError) as error:
        failure = error
    if reasons := gathered([] if failure is None else [str(failure)]):
        raise RefusedError("; ".join(reasons)) from failure
    return result  # type: ignore[return-value]


def is_true_on_any(flag: bool) -> bool:
    """Return whether the flag is True on any rank; a collective call."""
    flags = torch.tensor([flag], dtype=torch.int32)
    dist.all_reduce(flags, op=dist.ReduceOp.MAX)
    return bool(flags.item())


def gathered(lines: list[str]) -> list[str]:
    """Return the distinct lines of all ranks, sorted; a collective call."""
    by_rank: list[list[str]] = [[]] * dist.get_world_size()
    dist.all_gather_object(by_rank, lines)
    return sorted({line for some in by_rank for line in some})
