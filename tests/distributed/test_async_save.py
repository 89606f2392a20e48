"""Background saves: identical to other saves, one at a time; failures end all ranks, a stop loses nothing."""

from __future__ import annotations

import os
import resource
import signal
from pathlib import Path

import orjson
import pytest

from megatron_cpt.checkpoint import layout
from megatron_cpt.checkpoint.manifest import find_faults, read_manifest
from tests.helpers.checkpoints import differing
from tests.helpers.ranks import RankError, run_ranks
from tests.helpers.runs import newest, small_run, train_here, train_several, train_with_hooks


def _names(output: Path) -> list[str]:
    return sorted(path.name for path in (output / "checkpoints").iterdir())


@pytest.fixture(scope="module")
def short_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return run.yaml of a run of 8 steps that saves every second step."""
    return small_run(
        tmp_path_factory.mktemp("async"),
        tokens=8 * 8 * 32,
        checkpoint={"every": 2},
        precision={"compute": "bf16"},
    )


@pytest.fixture(scope="module")
def both(short_run: Path) -> tuple[Path, Path]:
    """Run it with saves that training waits for, and with background saves and a resume in the middle."""
    folder = short_run.parent
    background = [f"output={folder}/background", "checkpoint={every: 2, async: true, keep: 2, keep_every: 4}"]
    run_ranks(
        2,
        train_several,
        str(short_run),
        [[f"output={folder}/waiting"], [*background, "stop_at_step=5"], background],
    )
    return folder / "waiting", folder / "background"


def test_a_save_in_the_background_has_the_bits_of_one_that_training_waits_for(both: tuple[Path, Path]) -> None:
    waiting, background = both
    assert newest(waiting).name == newest(background).name == "step-00000008"
    for step in (4, 6, 8):
        name = layout.checkpoint_name(step)
        assert differing(waiting / "checkpoints" / name, background / "checkpoints" / name) == []
        assert find_faults(background / "checkpoints" / name) == []


def test_the_newest_and_every_so_manyth_stay(both: tuple[Path, Path]) -> None:
    waiting, background = both
    assert _names(waiting) == ["latest", *(layout.checkpoint_name(step) for step in (2, 4, 6, 8))]
    # keep: 2 newest, keep_every: 4; step 5, where the run was stopped, is deleted like the others
    assert _names(background) == ["latest", *(layout.checkpoint_name(step) for step in (4, 6, 8))]


def _train_with_late_copies(path: str, overrides: list[str]) -> tuple[int, list[bool]]:
    """Start each copy only after the forward pass of the next step; the third copy belongs to the end of the run."""
    import threading

    from megatron_cpt.checkpoint.saving.staging import StagingBuffer
    from megatron_cpt.train.forward import ForwardPass

    copy, forward = StagingBuffer.copy, ForwardPass.__call__
    passes, is_over = [], threading.Condition()

    def copy_late(staging: StagingBuffer, tensors: object) -> object:
        with is_over:
            began = len(passes)
            happened = is_over.wait_for(lambda: len(passes) > began, timeout=30 if len(found) < 2 else 0)
        found.append(happened)
        return copy(staging, tensors)

    def forward_and_notify(*args: object, **kwargs: object) -> object:
        result = forward(*args, **kwargs)
        with is_over:
            passes.append(None)
            is_over.notify_all()
        return result

    found: list[bool] = []
    StagingBuffer.copy, ForwardPass.__call__ = copy_late, forward_and_notify
    try:
        return train_here(path, overrides), found
    finally:
        StagingBuffer.copy, ForwardPass.__call__ = copy, forward


def test_the_state_is_copied_beside_the_next_step_and_before_its_update(
    both: tuple[Path, Path], short_run: Path, tmp_path: Path
) -> None:
    overrides = [f"output={tmp_path}/late", "checkpoint={every: 3, async: true}", "stop_at_step=7"]
    for status, were_beside in run_ranks(2, _train_with_late_copies, str(short_run), overrides):
        assert status == 0
        assert were_beside == [True, True, False], "steps 3 and 6 waited for their copies"
    name = layout.checkpoint_name(6)
    assert differing(both[0] / "checkpoints" / name, tmp_path / "late" / "checkpoints" / name) == []


def _staged_sizes(path: str, overrides: list[str]) -> tuple[list[list[int]], list[list[int]]]:
    """Return the sizes of all tensors of each reservation and of each copy on this rank."""
    from megatron_cpt.checkpoint.saving.staging import StagingBuffer

    reserve, copy = StagingBuffer.reserve, StagingBuffer.copy
    reserved: list[list[int]] = []
    copied: list[list[int]] = []

    def note_reserve(staging: StagingBuffer, sizes: list[int]) -> None:
        reserved.append(sorted(sizes))
        reserve(staging, sizes)

    def note_copy(staging: StagingBuffer, tensors: list) -> object:
        copied.append(sorted(tensor.nbytes for tensor in tensors))
        return copy(staging, tensors)

    StagingBuffer.reserve, StagingBuffer.copy = note_reserve, note_copy
    try:
        assert train_here(path, overrides) == 0
    finally:
        StagingBuffer.reserve, StagingBuffer.copy = reserve, copy
    return reserved, copied


@pytest.mark.parametrize(
    "parallel",
    ["{}", *(pytest.param(one, marks=pytest.mark.long) for one in ("{tensor: 2}", "{distributed_optimizer: false}"))],
)
def test_after_the_first_step_the_host_memory_has_the_size_of_every_save(
    short_run: Path, tmp_path: Path, parallel: str
) -> None:
    overrides = [f"output={tmp_path}/out", "checkpoint={every: 3, async: true}", "stop_at_step=4"]
    overrides += [f"parallel={parallel}", "model={preset: tiny_llama, vocab: 257}"]  # gated: one parameter, two tensors
    for reserved, copied in run_ranks(2, _staged_sizes, str(short_run), overrides):
        assert len(copied) == 2
        assert reserved == [copied[0]] == [copied[1]]


def _full_disk_on_one_rank(path: str, overrides: list[str], reports: str) -> None:
    import torch.distributed as dist

    from megatron_cpt.errors import CptError

    rank = dist.get_rank()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    if rank == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, hard))
    try:
        train_here(path, overrides)
    except CptError as error:
        message = str(error)
    else:
        message = "nothing was raised"
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    Path(reports, f"{rank}.txt").write_text(message)


@pytest.mark.parametrize("background", ["true", pytest.param("false", marks=pytest.mark.long)])
def test_a_writer_that_fails_on_one_rank_is_one_clear_error_on_all(
    short_run: Path, tmp_path: Path, background: str
) -> None:
    output = tmp_path / "out"
    common = [f"output={output}", "checkpoint.every=3", f"checkpoint.async={background}"]
    run_ranks(2, train_here, str(short_run), [*common, "stop_at_step=3"])
    before = {path: path.read_bytes() for path in newest(output).iterdir()}
    run_ranks(2, _full_disk_on_one_rank, str(short_run), common, str(tmp_path))
    messages = {rank: (tmp_path / f"{rank}.txt").read_text() for rank in (0, 1)}
    assert messages[0] == messages[1]
    assert messages[0].startswith("the checkpoint of step 6 was not written: rank 1: [Errno 27] File too large")
    assert newest(output).name == "step-00000003"
    assert {path: path.read_bytes() for path in newest(output).iterdir()} == before
    run_ranks(2, train_here, str(short_run), [*common, "stop_at_step=6"])  # the disk has space again
    assert _names(output) == ["latest", "step-00000003", "step-00000006"]


def _stop_during_a_save(path: str, overrides: list[str]) -> tuple[int, bool]:
    """Send SIGTERM to one rank while the writers of the first save are blocked."""
    import threading

    import torch.distributed as dist

    from megatron_cpt.checkpoint.saving import saver
    from megatron_cpt.hooks import Hook

    may_write, was_in_flight = threading.Event(), []
    write_files = saver.write_files

    def write_when_allowed(*args: object) -> object:
        may_write.wait(60)
        return write_files(*args)

    class Stop(Hook):
        def on_step(self, session) -> None:
            if session.state.step == 3:
                was_in_flight.append(not newest_is(session.output, 2))
                if dist.get_rank() == 1:
                    os.kill(os.getpid(), signal.SIGTERM)
            if session.state.step == 4:
                may_write.set()

    saver.write_files = write_when_allowed
    try:
        # the stop is noticed at step 3 or 4; the save of step 2 is published before the last save starts
        threading.Timer(20, may_write.set).start()
        status = train_with_hooks(path, overrides, hooks=[Stop()])
    finally:
        saver.write_files = write_files
    return status, was_in_flight == [True]


def newest_is(output: Path, step: int) -> bool:
    return (output / "checkpoints" / layout.checkpoint_name(step)).exists()


def test_a_stop_waits_for_the_save_under_way_and_publishes_it(short_run: Path, tmp_path: Path) -> None:
    overrides = [f"output={tmp_path}/out", "checkpoint.every=2", "checkpoint.async=true"]
    results = run_ranks(2, _stop_during_a_save, str(short_run), overrides)
    assert results == [(75, True)] * 2
    first, last = _names(tmp_path / "out")[1], newest(tmp_path / "out")
    assert first == "step-00000002"
    assert last.name in ("step-00000003", "step-00000004")
    for name in (first, last.name):
        assert find_faults(tmp_path / "out" / "checkpoints" / name) == []


def test_each_data_parallel_rank_writes_its_own_part_of_the_optimizer(both: tuple[Path, Path]) -> None:
    """Nothing is gathered: the files of both ranks hold the moments, each byte once."""
    waiting, _ = both
    files = read_manifest(newest(waiting))
    sizes = [sum(digest.size for name, digest in files.items() if name.startswith(f"__{rank}_")) for rank in (0, 1)]
    plain = orjson.loads((newest(waiting) / "plan.json").read_bytes())
    parameters = plain["parameters"]
    # bf16 weights on rank 0; fp32 master weights and two moments, 12 bytes per parameter, half on each rank
    assert sizes[1] == pytest.approx(6 * parameters, rel=0.15)
    assert sizes[0] == pytest.approx(8 * parameters, rel=0.15)


def test_a_run_whose_save_failed_is_said_to_have_failed(short_run: Path, tmp_path: Path) -> None:
    """Without a handler the error ends the process."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "checkpoints").write_text("a file in place of the folder")
    with pytest.raises(RankError, match="the checkpoint of step 2 was not written: rank 0"):
        run_ranks(1, train_here, str(short_run), [f"output={tmp_path}/out"])
