"""Two runs never train in one run directory."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.command import run_command
from tests.helpers.ranks import run_ranks
from tests.helpers.runs import read_metrics

ROOT = Path(__file__).parents[2]

HOLD = """
import sys
from pathlib import Path
import torch.distributed as dist
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
from megatron_cpt.train.resilience.run_lock import run_lock
with run_lock(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def _environment(**more: str) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **more}


def _hold(output: Path, **environment: str) -> subprocess.Popen[str]:
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(output)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=_environment(**environment),
    )
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    return holder


def _train(run_file: Path, output: Path) -> subprocess.CompletedProcess[str]:
    return run_command(["train", run_file, f"output={output}", "stop_at_step=2"])


def test_a_second_run_in_one_output_is_refused_until_the_first_one_ends(run_file: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    holder = _hold(output, SLURM_JOB_ID="99")
    try:
        before = sorted(output.iterdir())
        refused = _train(run_file, output)
        assert refused.returncode == 2, refused.stderr
        message = refused.stderr.strip().splitlines()[-1]
        assert f"output: {output}: another run is training in it (process {holder.pid} on " in message
        assert ", job 99, since " in message
        assert "Traceback" not in refused.stderr
        assert sorted(output.iterdir()) == before
    finally:
        holder.kill()  # the system releases the lock
        holder.communicate()
    done = _train(run_file, output)
    assert done.returncode == 0, done.stderr
    assert f"the earlier run ended without releasing its lock: process {holder.pid}" in done.stderr
    assert len(read_metrics(output)) == 2
    assert not list(output.glob("*lock*")) + list(output.glob(".*lock*"))


def test_a_lock_of_a_run_that_wrote_nothing_leaves_no_trace(tmp_path: Path) -> None:
    output = tmp_path / "deep" / "out"
    holder = _hold(output)
    holder.communicate("")
    assert holder.returncode == 0
    assert list(tmp_path.iterdir()) == []


def _try_lock(output: str) -> str:
    from megatron_cpt.errors import UserError
    from megatron_cpt.train.resilience.run_lock import run_lock

    try:
        with run_lock(Path(output), wait=0.1):
            return "held"
    except UserError as error:
        return str(error)


def test_every_rank_is_refused(tmp_path: Path) -> None:
    holder = _hold(tmp_path / "out")
    try:
        answers = run_ranks(2, _try_lock, str(tmp_path / "out"))
    finally:
        holder.send_signal(signal.SIGKILL)
        holder.communicate()
    assert len(set(answers)) == 1
    assert "another run is training in it" in answers[0]
    with pytest.raises(FileNotFoundError):
        (tmp_path / "out" / "run.yaml").stat()
    assert run_ranks(2, _try_lock, str(tmp_path / "out")) == ["held", "held"]


FAILS = """
import sys
from pathlib import Path
import torch.distributed as dist
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
from megatron_cpt.errors import CptError
from megatron_cpt.train.resilience import run_lock as module
write = module.write_atomically
def disk_is_full(*_): raise OSError(28, "No space left on device")
def attempt(output):
    try:
        with module.run_lock(output, wait=0.1):
            return "held"
    except CptError as error:
        return str(error)
output = Path(sys.argv[1]) / "new" / "out"
module.write_atomically = disk_is_full
print(attempt(output), output.parent.exists())
module.write_atomically = write
print(attempt(output))
print(attempt(output.with_name("a" * 300)))
"""


def test_a_lock_that_could_not_be_described_is_released_with_its_folders(tmp_path: Path) -> None:
    """After a full disk, a second attempt of the same process printed that another run trains in the directory."""
    command = [sys.executable, "-c", FAILS, str(tmp_path)]
    ended = subprocess.run(command, capture_output=True, text=True, check=True, env=_environment())
    full, second, too_long = ended.stdout.splitlines()
    assert "No space left on device" in full
    assert full.endswith("False")
    assert second == "held"
    assert "File name too long: the run directory cannot be written" in too_long
