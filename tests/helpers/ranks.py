"""Start the ranks of a gloo job in processes of their own, and collect their results."""

from __future__ import annotations

import multiprocessing
import queue
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

context = multiprocessing.get_context("forkserver")
context.set_forkserver_preload(["tests.helpers.preload"])


class RankError(AssertionError):
    """A rank raised an error or died; the message contains its traceback."""


def run_ranks(num_ranks: int, function: Callable[..., Any], *args: Any, timeout: float = 600.0) -> list[Any]:
    """Call `function(*args)` on every rank of a new gloo job.

    Args:
        num_ranks: processes to start.
        function: a module-level function with a picklable result.
        args: its arguments, equal on every rank.
        timeout: seconds after which the job is killed and the test fails.

    Returns:
        The results in the order of ranks.

    Raises:
        RankError: a rank raised, died or hung; the others are killed.
    """
    results: Any = context.Queue()
    with tempfile.TemporaryDirectory() as folder:
        store = Path(folder) / "store"
        ranks = [
            context.Process(target=_rank, args=(rank, num_ranks, str(store), results, function, args))
            for rank in range(num_ranks)
        ]
        for process in ranks:
            process.start()
        try:
            return _collect(ranks, results, time.monotonic() + timeout)
        finally:
            for process in ranks:
                process.kill()
                process.join()


def _collect(ranks: list[Any], results: Any, deadline: float) -> list[Any]:
    found: dict[int, Any] = {}
    while len(found) < len(ranks):
        try:
            rank, value, error = results.get(timeout=0.2)
        except queue.Empty:
            dead = [n for n, process in enumerate(ranks) if n not in found and process.exitcode not in (None, 0)]
            if dead or time.monotonic() > deadline:
                raise RankError(f"ranks {dead} died" if dead else "the job hung") from None
            continue
        if error is not None:
            raise RankError(f"rank {rank}:\n{error}")
        found[rank] = value
    return [found[rank] for rank in range(len(ranks))]


def _rank(
    rank: int, num_ranks: int, store: str, results: Any, function: Callable[..., Any], args: tuple[Any, ...]
) -> None:
    import torch
    import torch.distributed as dist

    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    try:
        dist.init_process_group("gloo", store=dist.FileStore(store, num_ranks), rank=rank, world_size=num_ranks)
        value = function(*args)
        dist.barrier()
        results.put((rank, value, None))
    except BaseException:  # noqa: BLE001 - any error must reach the test
        results.put((rank, None, traceback.format_exc()))
