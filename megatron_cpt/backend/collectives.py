"""Collective calls for work that may fail on one rank: either every rank gets a result, or every rank raises.

If one rank raised alone, the other ranks would wait for it in their next collective.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
import torch.distributed as dist

from megatron_cpt.errors import CptError, RefusedError
from megatron_cpt.files.retry import is_path_error
from megatron_cpt.files.system_errors import describe_os_error

T = TypeVar("T")
Entry = TypeVar("Entry", str, tuple[bool, str])


def on_main(work: Callable[[], T]) -> T:
    """Run a function on rank 0 and return its result on all ranks; a collective call.

    Raises:
        CptError: on all ranks, if the function raised it or an OSError.
    """
    outcome: list[tuple[T | None, CptError | None]] = [(None, None)]
    if dist.get_rank() == 0:
        try:
            outcome = [(work(), None)]
        except CptError as error:
            outcome = [(None, error)]
        except OSError as error:
            outcome = [(None, _as_cpt_error(error))]
    dist.broadcast_object_list(outcome, src=0)
    result, failure = outcome[0]
    if failure is not None:
        raise failure
    return result  # type: ignore[return-value]  # None only beside a failure


def on_all(work: Callable[[], T]) -> T:
    """Run a function on every rank and return this rank's result; a collective call.

    Raises:
        RefusedError: on all ranks, if the function raised it on any; with all reasons.
        CptError: on all ranks, if the disk failed on any, because then nothing is known about the content of files.
    """
    result: T | None = None
    failure: CptError | None = None
    try:
        result = work()
    except RefusedError as error:
        failure = error
    except OSError as error:
        failure = _as_cpt_error(error)
    reasons = gathered([] if failure is None else [(isinstance(failure, RefusedError), str(failure))])
    if disk_errors := [text for is_refused, text in reasons if not is_refused]:
        raise CptError("; ".join(disk_errors)) from failure
    if reasons:
        raise RefusedError("; ".join(text for _, text in reasons)) from failure
    return result  # type: ignore[return-value]  # None only beside a failure


def _as_cpt_error(error: OSError) -> CptError:
    """Return the message for all ranks; only an error about the path says something about the files themselves."""
    return RefusedError(str(error)) if is_path_error(error) else CptError(describe_os_error(error))


def gathered(entries: list[Entry]) -> list[Entry]:
    """Return the distinct entries of all ranks, sorted; a collective call."""
    by_rank: list[list[Entry]] = [[]] * dist.get_world_size()
    dist.all_gather_object(by_rank, entries)
    return sorted({entry for some in by_rank for entry in some})


def is_true_on_any(flag: bool) -> bool:
    """Return whether the flag is True on any rank; a collective call."""
    flags = torch.tensor([flag], dtype=torch.int32)
    dist.all_reduce(flags, op=dist.ReduceOp.MAX)
    return bool(flags.item())
