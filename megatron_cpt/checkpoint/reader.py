"""Reading tensors of a checkpoint with several threads; torch's reader takes them one after the other."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.planner import LoadPlan, ReadItem
from torch.futures import Future

MAX_THREADS = 4


@contextlib.contextmanager
def in_threads() -> Iterator[None]:
    """Inside the block, torch's file reader shares its work among threads.

    Reading and copying leave Python's lock, and each item goes to a place of its own.
    """
    read_data = FileSystemReader.read_data

    def read_in_parts(reader: Any, plan: LoadPlan, planner: Any) -> Future[None]:
        parts = _divide(plan.items, reader.storage_data, min(MAX_THREADS, os.cpu_count() or 1))
        with ThreadPoolExecutor(MAX_THREADS, thread_name_prefix="load") as threads:
            jobs = [threads.submit(read_data, reader, dataclasses.replace(plan, items=part), planner) for part in parts]
            for job in jobs:
                job.result()
        done: Future[None] = Future()
        done.set_result(None)
        return done

    FileSystemReader.read_data = read_in_parts  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        FileSystemReader.read_data = read_data  # type: ignore[method-assign]


def _divide(items: list[ReadItem], places: dict[Any, Any], num_parts: int) -> list[list[ReadItem]]:
    """Runs of neighbours in the files, of about the same number of bytes."""

    def place(item: ReadItem) -> Any:
        return places[item.storage_index]

    items = sorted(items, key=lambda item: (place(item).relative_path, place(item).offset))
    total = sum(place(item).length for item in items)
    parts: list[list[ReadItem]] = [[] for _ in range(num_parts)]
    done = 0
    for item in items:
        parts[done * num_parts // max(total, 1)].append(item)
        done += place(item).length
    return [part for part in parts if part]
