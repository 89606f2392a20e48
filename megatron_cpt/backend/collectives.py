"""What ranks read from a disk that they share: all get an answer, or all end with the same error.

One rank that raises by itself leaves the others waiting in the next collective call.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch.distributed as dist

from megatron_cpt.errors import CptError, RefusedError

T = TypeVar("T")


def on_main(work: Callable[[], T]) -> T:
    """Do something on rank 0 alone; a collective call.

    Returns:
        Its result, on all ranks.

    Raises:
        CptError: what it raised, on all ranks.
        RefusedError: the disk failed it.
    """
    told: list[tuple[T | None, CptError | None]] = [(None, None)]
    if dist.get_rank() == 0:
        try:
            told = [(work(), None)]
        except CptError as error:
            told = [(None, error)]
        except OSError as error:
            told = [(None, RefusedError(str(error)))]
    dist.broadcast_object_list(told, src=0)
    result, failure = told[0]
    if failure is not None:
        raise failure
    return result  # type: ignore[return-value]  # without an error, it is there


def on_all(work: Callable[[], T]) -> T:
    """Do something on every rank; a collective call.

    Returns:
        This rank's result.

    Raises:
        RefusedError: it was refused on some rank, or a disk failed it; with the reasons of all such ranks.
    """
    result, failure = None, None
    try:
        result = work()
    except (RefusedError, OSError) as error:
        failure = error
    if reasons := gathered([] if failure is None else [str(failure)]):
        raise RefusedError("; ".join(reasons)) from failure
    return result  # type: ignore[return-value]


def gathered(lines: list[str]) -> list[str]:
    """The lines of all ranks, sorted and each once, the same on every rank; a collective call."""
    every: list[list[str]] = [[]] * dist.get_world_size()
    dist.all_gather_object(every, lines)
    return sorted({line for some in every for line in some})
