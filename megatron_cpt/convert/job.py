"""Work folder of a conversion: one process at a time, resumable, published by one rename.

Import and export write into a folder beside their target. Its journal has one line per finished part, such as
`{"file": "__0_0.distcp", ...}`. Running the same command again after an interruption keeps the parts in the journal and
writes the others. If a source file or an option has changed, the conversion restarts from scratch.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Self

from megatron_cpt.errors import RefusedError, UserError
from megatron_cpt.files.atomic import sync_folder
from megatron_cpt.files.output_path import output_problem
from megatron_cpt.files.resumable import DurableJournal, ResumableFolder
from megatron_cpt.files.whole_io import DiskFile

JOURNAL_FILE = "journal.jsonl"

Advance = Callable[[int, int], None]
"""Progress callback: advance(bytes done since the last call, bytes in total), called from any thread."""


def no_progress(_: int, __: int) -> None:
    """Ignore progress."""


class JobFolder(ResumableFolder):
    """Folder in which a conversion writes its result, locked against other processes inside `with`.

    Args:
        target: name under which the result is published; the work folder is beside it.
        job: everything that determines the result: source files with sizes and times, and all options.
        needed_bytes: size of the result.

    Attributes:
        journal: finished parts, from earlier calls and this one.

    Raises:
        UserError: from `__enter__`: the target exists, another process is writing it, the folder holds files that no
            conversion has written, or the disk is too small.
    """

    journal: DurableJournal

    def __init__(self, path: Path, target: Path, job: Mapping[str, Any], *, needed_bytes: int) -> None:
        # Under a launcher that starts the same command many times, one process converts and the others fail at once.
        lock_path = target.with_name(f".{target.name}.lock")
        super().__init__(path, job, progress_file=JOURNAL_FILE, lock_path=lock_path, should_discard_other_settings=True)
        self._target, self._needed_bytes = target, needed_bytes

    def __enter__(self) -> Self:
        self._target.parent.mkdir(parents=True, exist_ok=True)
        self._require_space()
        super().__enter__()
        self.journal = DurableJournal(self.path / JOURNAL_FILE)
        try:
            refuse_existing(self._target)  # the lock may have been waited for while another process published
        except UserError as error:
            self.remove()
            super().__exit__(UserError, error, None)
            raise
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        """Unlock the target. A refused source leaves nothing, because no later call could continue its conversion."""
        if isinstance(error, RefusedError):
            self.remove()
        super().__exit__(kind, error, trace)

    def start_from_scratch(self) -> None:
        """Empty the folder and begin a new journal."""
        super().start_from_scratch()
        self.journal = DurableJournal(self.path / JOURNAL_FILE)

    def publish(self) -> None:
        """Write everything to the disk and give the folder its final name."""
        for path in sorted(self.path.rglob("*")):
            if path.is_dir():
                sync_folder(path)
            else:
                with DiskFile(path) as file:
                    file.sync()
        self.publish_as(self._target)

    def _require_space(self) -> None:
        free = shutil.disk_usage(self._target.parent).free
        written = sum(file.stat().st_blocks * 512 for file in self.path.rglob("*") if file.is_file())
        if free + written < self._needed_bytes:
            raise UserError(
                f"{self._target.parent}: {self._needed_bytes / 1e9:.1f} GB are needed, {free / 1e9:.1f} GB are free; "
                "free some space or choose another disk"
            )


def refuse_existing(target: Path) -> None:
    """Raise `UserError` unless a folder can be created under a name: nothing exists there, or only an empty folder."""
    if problem := output_problem(target, ending=".partial.lock"):
        raise UserError(f"{target}: {problem}")
    if target.is_symlink() or (target.exists() and not (target.is_dir() and not any(target.iterdir()))):
        raise UserError(f"{target}: exists already; remove it or choose another name")


def group_by_size(sizes: Mapping[str, int], limit: int) -> list[list[str]]:
    """Return the names in groups of at most `limit` bytes, in order; a larger item gets a group of its own."""
    groups: list[list[str]] = []
    free = 0
    for name, size in sizes.items():
        if not groups or size > free:
            groups.append([])
            free = limit
        groups[-1].append(name)
        free -= size
    return groups


def run_parallel(work: Callable[[Any], None], items: list[Any], workers: int) -> None:
    """Call `work` on every item in `workers` threads (0: one per core); after the first error no other item is started.

    Threads suffice: reading, writing and hashing release Python's global lock.
    """
    pool = ThreadPoolExecutor(max_workers=max(1, workers or os.cpu_count() or 1))
    try:
        for future in [pool.submit(work, item) for item in items]:
            future.result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
