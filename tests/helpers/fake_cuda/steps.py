"""Training steps of one rank of a large layout on the fake device, from run.yaml and token files on."""

from __future__ import annotations

import gc
import tempfile
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from megatron_cpt.data.tokenfile.writer import IndexedDatasetWriter
from tests.helpers.fake_cuda import RUN, device
from tests.helpers.fake_cuda.kernels import compiler_for
from tests.helpers.fake_cuda.mode import FakeCuda

NUM_STEPS = 2  # the first one creates the optimizer's states and tables of positions


@dataclass(frozen=True)
class Case:
    """One rank of a job.

    Attributes:
        rank, world_size: of the job.
        overrides: changes of `RUN`.
        micro_batches: of this rank per step; the global batch follows from it.
        explains: the report says which operators created the memory of the peak.
    """

    rank: int
    world_size: int
    overrides: list[str] = field(default_factory=list)
    micro_batches: int = 8
    explains: bool = False


_mode: FakeCuda | None = None


def run_case(case: Case) -> dict[str, Any]:
    """Train `NUM_STEPS` steps; return the waits, casts and memory of the last one."""
    mode = _installed()
    with tempfile.TemporaryDirectory() as folder, device.process_group(case.rank, case.world_size), mode:
        report = _train(case, Path(folder), mode)
    gc.collect()
    mode.memory.forget()
    return report


def _installed() -> FakeCuda:
    global _mode
    if _mode is None:
        _mode = FakeCuda()
        device.install(_mode.note, compiler_for(_mode.memory))
    return _mode


def _train(case: Case, folder: Path, mode: FakeCuda) -> dict[str, Any]:
    from megatron_cpt.backend import process_groups
    from megatron_cpt.prepare import prepare_config

    run = _run_config(case, folder)
    prepared = prepare_config(run, need_files=True, num_gpus=case.world_size)
    with process_groups(run.parallel) as ranks, _local_decisions():
        from megatron_cpt.train.setup import setup
        from megatron_cpt.train.step import train_step

        session = setup(prepared.config, prepared.plan, ranks, eod_id=0)
        mode.waits.clear()
        with _in_every_thread(mode):
            steps = list(session.loader)
        session.loader.close()
        assert len(steps) == NUM_STEPS
        upload_waits = [asdict(wait) for wait in mode.waits]
        for step in steps:
            gc.collect()
            mode.waits.clear()
            mode.casts.clear()
            mode.memory.explains = case.explains
            mode.memory.reset_peak()
            before = mode.memory.now
            train_step(
                session.forward,
                session.update,
                step,
                1e-5,
                contributes_loss=session.meter.contributes_loss,
                requests=lambda: (False, False),
                judge=lambda *_: None,
                before_update=session.saver.wait_for_copy,
            )
        after = mode.memory.now
        session.saver.close()
    parameters = [parameter for chunk in session.model.chunks for parameter in chunk.parameters()]
    return {
        "case": asdict(case),
        "stage": ranks.pipeline_rank,
        "layers": session.model.layers,
        "knobs": sorted(session.model.knobs),
        "parameters": sum(parameter.numel() for parameter in parameters),
        "devices": sorted({str(parameter.device) for parameter in parameters}),
        "waits": [asdict(wait) for wait in mode.waits],
        "upload_waits": upload_waits,
        "casts": Counter(f"{cast.kind} at {cast.place}" for cast in mode.casts),
        "memory": {"peak": mode.memory.peak, "before": before, "after": after},
        "at_peak": mode.memory.at_peak.most_common(20),
    }


def _run_config(case: Case, folder: Path) -> Any:
    """Return the run of a case, with token files that last for its steps."""
    from megatron_cpt.config import draft_config

    overrides = [*case.overrides, f"output={folder / 'run'}"]
    overrides += [f"sources.{name}.path={folder / name}" for name in RUN["sources"]]
    draft = draft_config(dict(RUN), overrides)
    assert draft.config is not None, draft.problems
    config = draft.config
    replicas = case.world_size // config.parallel.model_parallel_size
    samples = case.micro_batches * config.batch.micro * replicas
    tokens = NUM_STEPS * samples * config.seq_length
    for name in RUN["sources"]:
        with IndexedDatasetWriter(folder / name, "<i4") as writer:
            for _ in range(4):
                writer.add_document(np.arange(1, tokens // 4 + 2) % 1000)
    return draft_config(dict(RUN), [*overrides, f"batch.global={samples}", f"tokens={tokens}"]).finish("fake")


@contextmanager
def _local_decisions() -> Iterator[None]:
    """Let every rank look for checkpoints itself, because no other rank answers, and draw no weights on the CPU."""
    import torch.distributed as dist

    from megatron_cpt.checkpoint.loading import find_valid
    from megatron_cpt.model import build_model
    from megatron_cpt.train import first_start
    from megatron_cpt.train import setup as train_setup

    def gather_own(results: list[Any], own: Any, **_: Any) -> None:
        results[:] = [own] * len(results)

    replaced: list[tuple[Any, str, Callable[..., Any]]] = [
        *((module, "on_main", lambda work: work()) for module in (find_valid, first_start, train_setup)),
        (dist, "all_gather_object", gather_own),
        (build_model, "initialize_weights", lambda *_: None),
    ]
    originals = [getattr(module, name) for module, name, _ in replaced]
    for module, name, replacement in replaced:
        setattr(module, name, replacement)
    try:
        yield
    finally:
        for (module, name, _), original in zip(replaced, originals, strict=True):
            setattr(module, name, original)


@contextmanager
def _in_every_thread(mode: FakeCuda) -> Iterator[None]:
    """Let threads that start inside use the fake device too; modes of torch belong to one thread."""
    run = threading.Thread.run

    def run_with_mode(thread: threading.Thread) -> None:
        with mode.for_thread():
            run(thread)

    threading.Thread.run = run_with_mode  # type: ignore[method-assign]
    try:
        yield
    finally:
        threading.Thread.run = run  # type: ignore[method-assign]
