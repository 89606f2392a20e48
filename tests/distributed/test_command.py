"""`megatron-cpt train` started by a user or a scheduler: real processes, real signals, exit status."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.checkpoints import differing
from tests.helpers.command import run_command, start_command
from tests.helpers.ranks import RankError, run_ranks
from tests.helpers.runs import newest, read_metrics, train_here

TRAIN = [sys.executable, "-m", "megatron_cpt", "train"]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


def _wait_for_lines(output: Path, count: int, process: Any) -> None:
    metrics = output / "metrics.jsonl"
    while process.exitcode is None:
        if metrics.exists() and metrics.read_bytes().count(b"\n") >= count:
            return
        time.sleep(0.02)
    raise AssertionError(f"the run ended early with status {process.exitcode}")


def _status(process: Any) -> int:
    process.join(120)
    assert process.exitcode is not None, "the run did not end"
    return int(process.exitcode)


LONGER = f"tokens={60 * 256}"


@pytest.fixture(scope="module")
def unbroken(run_file: Path) -> Path:
    output = run_file.parent / "never-signaled"
    run_ranks(1, train_here, str(run_file), [LONGER, f"output={output}"])
    return output


@pytest.mark.parametrize(
    "number",
    [signal.SIGTERM, *(pytest.param(number, marks=pytest.mark.long) for number in (signal.SIGUSR1, signal.SIGINT))],
)
def test_a_signal_saves_and_ends_with_75_and_a_later_call_goes_on(
    run_file: Path, unbroken: Path, tmp_path: Path, number: signal.Signals
) -> None:
    output = run_file.parent / f"signal-{number.name}"
    arguments = ["train", run_file, LONGER, f"output={output}"]
    process = start_command(arguments, stdout=tmp_path / "stdout", stderr=tmp_path / "stderr")
    _wait_for_lines(output, 3, process)
    os.kill(process.pid, number)
    assert _status(process) == 75
    step = int(newest(output).name.removeprefix("step-"))
    assert 3 <= step < 60
    assert read_metrics(output)[-1]["step"] == step
    assert run_ranks(1, train_here, str(run_file), [LONGER, f"output={output}"]) == [0]
    assert differing(newest(unbroken), newest(output)) == []


def test_ctrl_c_that_also_ends_tee_saves(run_file: Path, tmp_path: Path) -> None:
    """In `train 2>&1 | tee log`, Ctrl-C reaches both processes."""
    output, pipe = run_file.parent / "tee", tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    arguments = ["train", run_file, LONGER, f"output={output}"]
    process = start_command(arguments, stdout=tmp_path / "stdout", stderr=pipe)
    _wait_for_lines(output, 3, process)
    os.close(reader)
    os.kill(process.pid, signal.SIGINT)
    assert _status(process) == 75
    assert newest(output).name >= "step-00000003"


def test_torchrun_trains_on_two_ranks(run_file: Path) -> None:
    output = run_file.parent / "torchrun"
    command = [*TORCHRUN, *TRAIN[1:], str(run_file), f"output={output}", "parallel.tensor=2", "stop_at_step=2"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    assert newest(output).name == "step-00000002"
    assert (output / "run.yaml").exists()
    assert (output / "plan.json").exists()


def test_a_wrong_layout_is_one_message_and_writes_nothing(run_file: Path) -> None:
    output = run_file.parent / "wrong"
    wrong = ["parallel.tensor=3", "batch.micro=3", "sources.web.path=nowhere", "phases.qa.blend.qa=-1", "color=red"]
    done = run_command(["train", run_file, f"output={output}", *wrong])
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    for key in ("parallel.tensor: 3", "batch.micro: 3", "sources.web.path", "phases[1].blend.qa", "color"):
        assert key in done.stderr
    assert not output.exists()


def test_an_output_that_cannot_be_written_is_one_message(run_file: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    done = run_command(["train", run_file, f"output={tmp_path}/file/out"])
    assert done.returncode == 2
    assert done.stderr.count("megatron-cpt: error:") == 1
    assert f"{tmp_path}/file is not a folder; choose another place" in done.stderr
    assert "Traceback" not in done.stderr


def test_one_process_is_refused_where_a_replica_needs_two(run_file: Path) -> None:
    output = run_file.parent / "alone"
    command = [*TRAIN, str(run_file), f"output={output}", "parallel.pipeline=2"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 2
    assert "parallel.tensor x pipeline x context" in done.stderr
    assert not output.exists()


def test_a_damaged_checkpoint_is_passed_over_or_refused(run_file: Path) -> None:
    output = run_file.parent / "damaged"
    arguments = ["train", run_file, f"output={output}", "checkpoint.every=2"]
    assert run_command([*arguments, "stop_at_step=4"]).returncode == 0
    shard = next(newest(output).glob("__0_*.distcp"))
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    done = run_command([*arguments, "stop_at_step=6"])
    assert done.returncode == 0
    assert f"{shard.name}: checksum differs" in done.stderr
    assert [line["step"] for line in read_metrics(output)] == [1, 2, 3, 4, 5, 6]

    from_broken = [f"init.from={newest(output).parent / 'step-00000004'}", f"output={output}-2"]
    for checkpoint in (output / "checkpoints").glob("step-*"):
        os.truncate(next(checkpoint.glob("__0_*.distcp")), 100)
    done = run_command([*arguments, "stop_at_step=8"])
    assert done.returncode == 3
    assert "no valid checkpoint" in done.stderr
    assert "Traceback" not in done.stderr

    with pytest.raises(RankError, match=r"CorruptCheckpointError: .*step-00000004: corrupt: __0_\d\.distcp: 100 bytes"):
        run_ranks(1, train_here, str(run_file), from_broken)


def _emulate_bf16() -> None:
    from megatron_cpt.train import setup

    setup.emulates_bf16 = lambda: True


def test_bf16_on_a_cpu_that_emulates_it_is_said_once_with_what_to_set(run_file: Path) -> None:
    arguments = ["train", run_file, "stop_at_step=1"]
    bf16 = [*arguments, f"output={run_file.parent}/bf16", "precision.compute=bf16"]
    slow = run_command(bf16, prepare=_emulate_bf16)
    assert slow.returncode == 0, slow.stderr
    assert slow.stderr.count("bf16 is emulated on this CPU") == 1
    assert "set precision.compute=fp32" in slow.stderr
    fast = run_command([*arguments, f"output={run_file.parent}/fp32"], prepare=_emulate_bf16)
    assert "emulated" not in fast.stderr
