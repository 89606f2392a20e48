"""`megatron-cpt teach`: run a teacher over the sources of a run and write its cache; run by all ranks of a job.

Every record can be verified alone (`data/teacher_cache/top_k_records.py`), so there is no other record of progress: an
interrupted call leaves its files, and the next one computes the groups of windows that are missing or damaged.
"""

from __future__ import annotations

import contextlib
import logging
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_cpt.backend import launched_rank, own_process
from megatron_cpt.backend.collectives import is_true_on_any, on_all, on_main
from megatron_cpt.backend.distributed import job_group
from megatron_cpt.checkpoint.loading.inference_model import inference_run, load_inference_model, open_checkpoint
from megatron_cpt.checkpoint.record import SavedRun
from megatron_cpt.data.teacher_cache.cache_header import HEADER_FILE, CacheHeader, read_header
from megatron_cpt.data.teacher_cache.read_cache import TeacherCache
from megatron_cpt.errors import RefusedError, UserError
from megatron_cpt.files.atomic import write_atomically
from megatron_cpt.files.output_path import output_problem, refuse_output_inside
from megatron_cpt.files.resumable import ResumableFolder
from megatron_cpt.prepare import PreparedRun
from megatron_cpt.teach.cache_plan import CachePlan, TeachOptions, check_space, plan_cache
from megatron_cpt.train.open_data import document_options
from megatron_cpt.train.resume import compare_tokenizer
from megatron_cpt.train.run_files import read_tokenizer

if TYPE_CHECKING:
    from megatron_cpt.backend import StopRequest
    from megatron_cpt.checkpoint.loading.inference_model import InferenceModel
    from megatron_cpt.teach.window_rows import GivenRecords, WindowGroup, WindowRows

logger = logging.getLogger(__name__)

_STARTED_FILE = "started"
_ROWS_IN_FLIGHT = 8  # per replica, between two writes
_ROW_TOKENS = {"cpu": 512, "cuda": 4096}  # shorter windows are joined to rows of about this length
_MULTIPLE, _QUANTIZED_MULTIPLE = 16, 32  # of row lengths; FP8 and FP4 kernels want multiples of 16 tokens, MXFP8 of 32
_COLLECTIVE_TIMEOUT = 86400.0  # rank 0 verifies the records of an interrupted call while the others wait

Advance = Callable[[int, int], None]
"""Progress callback: advance(records that are written, records of the cache)."""


@dataclass(frozen=True)
class TeachReport:
    """Outcome of `make_cache`.

    Attributes:
        header: of the cache.
        new_records: records that this call computed.
        seconds: time of this call.
        is_finished: False if a signal stopped it.
    """

    header: CacheHeader
    new_records: int
    seconds: float
    is_finished: bool


def plan_teacher(checkpoint: str | Path, prepared: PreparedRun, options: TeachOptions) -> CachePlan:
    """Plan the cache of a teacher for the sources of a run, without loading a model.

    Args:
        checkpoint: the teacher: a checkpoint, or a run directory for its newest one.
        prepared: the run that will be trained.

    Raises:
        UserError: an option is wrong.
        RefusedError: the checkpoint is damaged or was trained with another tokenizer, or a token file is damaged.
    """
    saved = open_checkpoint(checkpoint)
    return _plan(saved, prepared, options)


def _plan(saved: SavedRun, prepared: PreparedRun, options: TeachOptions) -> CachePlan:
    run = prepared.config
    compare_tokenizer(saved, prepared.tokenizer, "teacher", "or choose a teacher that was trained with the data's")
    window = options.window or run.longest_sequence
    teacher = inference_run(saved, [f"seq_length={window}", *options.overrides])
    if teacher.parallel.context > 1:
        raise UserError(
            f"parallel.context: {teacher.parallel.context}: `teach` does not split sequences; use tensor and pipeline "
            "parallelism"
        )
    eod_id, _ = read_tokenizer(run)
    return plan_cache(
        saved,
        teacher,
        run,
        options,
        digest=saved.weights_digest(),
        documents=document_options(run, eod_id),
        tokenizer_fingerprint=prepared.tokenizer[1] if prepared.tokenizer is not None else None,
    )


def make_cache(
    checkpoint: str | Path,
    prepared: PreparedRun,
    output: str | Path,
    options: TeachOptions | None = None,
    *,
    notify: Callable[[str], None] = lambda text: None,
    advance: Advance = lambda done, total: None,
) -> TeachReport:
    """Make the cache of a teacher; every rank of the job calls this function, which is a collective.

    Args:
        checkpoint: the teacher: a checkpoint, or a run directory for its newest one.
        prepared: the run that will be trained.
        output: folder of the cache; unfinished work is in OUTPUT.partial beside it.
        notify: called on rank 0 with the size and the work, before the work starts.
        advance: progress callback on rank 0, see `Advance`.

    Raises:
        UserError: an option is wrong, the disk is too small, or another process makes this cache; nothing was written.
        RefusedError: the checkpoint or a token file is damaged, or the output has another cache.
    """
    options, output, started = options or TeachOptions(), Path(output), time.perf_counter()
    with own_process() as stop, job_group(timeout=_COLLECTIVE_TIMEOUT):
        saved = open_checkpoint(checkpoint)
        plan = _plan(saved, prepared, options)
        refuse_output_inside(output, saved.path)
        if on_main(lambda: _is_finished(output, plan.header)):
            return TeachReport(plan.header, 0, time.perf_counter() - started, is_finished=True)
        with contextlib.ExitStack() as stack:
            folder = ResumableFolder(
                output.with_name(f"{output.name}.partial"),
                {**plan.header.settings(), "files": [file.fingerprint for file in plan.header.files]},
                progress_file=_STARTED_FILE,
                should_restart=options.restart,
            )
            is_new = on_main(lambda: _open_folder(stack, folder, plan, output, notify))
            job = None
            try:
                with load_inference_model(saved, plan.teacher) as loaded:
                    job = _Job(plan, loaded, folder.path, advance)
                    written = job.run(stop, is_new=is_new)
            except (UserError, RefusedError):
                if is_new and (job is None or job.new_records == 0) and launched_rank() == 0:
                    folder.remove()  # it would stand in the way of another teacher
                raise
            if written is not None:
                on_main(lambda: _publish(folder, plan.header, output))
        return TeachReport(plan.header, job.new_records, time.perf_counter() - started, written is not None)


def _is_finished(output: Path, header: CacheHeader) -> bool:
    """Return whether the output is this cache already.

    Raises:
        UserError: it is something else, or nothing can be written there.
        RefusedError: it is this cache, and damaged.
    """
    if problem := output_problem(output, ending=".partial"):
        raise UserError(f"--output {output}: {problem}")
    if output.is_symlink() and not (output / HEADER_FILE).is_file():
        raise UserError(f"--output {output}: is a link, which the finished cache cannot replace; name another output")
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return False
    try:
        found = read_header(output)
    except RefusedError as error:
        raise UserError(f"--output {output}: exists and is no cache of a teacher; choose another output") from error
    if found.settings() == header.settings() and [file.fingerprint for file in found.files] == [
        file.fingerprint for file in header.files
    ]:
        TeacherCache(output)  # refuses a cache whose files are missing or were cut
        return True
    raise UserError(
        f"--output {output}: is a cache of another teacher, other files or other options; choose another output, or "
        "delete it"
    )


def _open_folder(
    stack: contextlib.ExitStack,
    folder: ResumableFolder,
    plan: CachePlan,
    output: Path,
    notify: Callable[[str], None],
) -> bool:
    """Lock the work folder and create its files; return whether the work starts from scratch."""
    from megatron_cpt.teach.record_files import create_files

    notify(f"{output}: {plan.describe()}")
    existing = next(path for path in (folder.path, *folder.path.absolute().parents) if path.exists())
    used = sum(path.stat().st_blocks * 512 for path in folder.path.glob("*.topk")) if folder.path.is_dir() else 0
    check_space(plan, output, shutil.disk_usage(existing).free + used)
    stack.enter_context(folder)
    started = folder.path / _STARTED_FILE
    is_new = not started.exists()
    create_files(folder.path, plan.header)
    write_atomically(started, b"")
    return is_new


def _publish(folder: ResumableFolder, header: CacheHeader, output: Path) -> None:
    write_atomically(folder.path / HEADER_FILE, header.to_bytes())
    folder.publish_as(output)


class _Job:
    """Work of one rank."""

    def __init__(self, plan: CachePlan, loaded: InferenceModel, folder: Path, advance: Advance) -> None:
        # imported here: megatron-core reads torch.cuda on import, and process_groups replaces it on a CPU
        from megatron_cpt.evaluate.row_forward import RowRunner
        from megatron_cpt.teach.window_rows import WindowRows

        self.new_records = 0
        self._header, self._folder, self._advance, self._ranks = plan.header, folder, advance, loaded.ranks
        self._runner = RowRunner(loaded.model.chunks, loaded.model.config, device=loaded.ranks.device)
        precision = plan.teacher.precision
        is_quantized = precision.fp8 is not None or precision.fp4 is not None
        row_tokens = _ROW_TOKENS["cpu" if loaded.ranks.device.type == "cpu" else "cuda"]
        self._rows: WindowRows = WindowRows(
            header=plan.header,
            datasets=plan.datasets,
            documents=plan.documents,
            group_size=max(1, row_tokens // plan.header.window),
            multiple=_QUANTIZED_MULTIPLE if is_quantized else _MULTIPLE,
        )

    def run(self, stop: StopRequest, *, is_new: bool) -> int | None:
        """Compute what is missing; return the number of new records, None if a signal stopped the work."""
        groups, total = self._missing(is_new=is_new), self._header.num_positions
        size = _ROWS_IN_FLIGHT * self._ranks.data_parallel_size
        with self._runner.evaluating():
            while batch := list(islice(groups, size)):
                own = batch[self._ranks.data_parallel_rank :: self._ranks.data_parallel_size]
                self._write(own)
                self.new_records += sum(self._count(group) for group in batch)
                self._advance(self._kept + self.new_records, total)
                if is_true_on_any(stop.received is not None):
                    return None
        from megatron_cpt.teach.record_files import sync_files

        on_all(lambda: sync_files(self._folder, self._header))
        return self.new_records

    def _missing(self, *, is_new: bool) -> Iterator[WindowGroup]:
        """Return the groups to compute, in order, equal on all ranks; `_kept` counts the records that need no work."""
        from megatron_cpt.teach.record_files import missing_groups

        files = range(len(self._header.files))
        found = None
        if not is_new:
            found = on_main(lambda: [missing_groups(self._folder, self._rows, file) for file in files])
        self._kept = 0
        if found is not None:
            left = sum(self._count(self._rows.group(file, int(n))) for file in files for n in found[file])
            self._kept = self._header.num_positions - left
        return (
            self._rows.group(file, int(number))
            for file in files
            for number in (range(self._rows.num_groups(file)) if found is None else found[file])
        )

    def _write(self, groups: list[WindowGroup]) -> None:
        """Compute groups and write their records; a collective of all ranks."""
        from megatron_cpt.teach.record_files import write_records

        rows = on_all(lambda: [self._rows.row(group, self._ranks.device) for group in groups])
        given: list[GivenRecords] = self._runner(rows) if rows else []

        def write() -> None:
            for one in given:
                if not one.is_finite:
                    raise RefusedError(
                        f"{self._header.teacher_path}: the teacher's logits for {self._header.files[one.file].prefix}, "
                        f"near token {one.start}, are not finite; use another checkpoint or precision"
                    )
            if self._ranks.is_last_stage and self._ranks.tensor_rank == 0:
                write_records(self._folder, self._header, given)

        on_all(write)

    def _count(self, group: WindowGroup) -> int:
        start, stop = self._header.grid(group.file).gives(group.first, group.stop)
        return stop - start
