"""Runs killed before any one of their file operations: published checkpoints are valid, and a resume loses nothing.

The resumed run ends with the same bits as a run that was never killed.
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from megatron_cpt.checkpoint.layout import LATEST_FILE, checkpoints_folder, list_checkpoints
from megatron_cpt.checkpoint.manifest import find_faults
from tests.helpers.checkpoints import differing
from tests.helpers.faults import Death
from tests.helpers.ranks import RankError, run_ranks
from tests.helpers.runs import newest, read_metrics, small_run, train_here, train_several

SMALL = {"preset": "tiny_llama", "layers": 1, "hidden": 64, "ffn_hidden": 96, "vocab": 257}
NEVER = 1_000_000  # changes; a process makes fewer
START, END = 3, 5  # the killed process resumes from step 3, saves step 4 and deletes step 2


@pytest.fixture(scope="module")
def small_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return run.yaml of a run that saves every step and keeps two checkpoints, so that every save deletes one."""
    return small_run(
        tmp_path_factory.mktemp("kill-save"), model=SMALL, checkpoint={"every": 1, "keep": 2}, ema={"decay": 0.5}
    )


@pytest.fixture(scope="module")
def start(small_file: Path) -> Path:
    """Return the run directory after three steps."""
    output = small_file.parent / "start"
    run_ranks(1, train_here, str(small_file), [f"output={output}", f"stop_at_step={START}"])
    return output


@pytest.fixture(scope="module")
def quiet(small_file: Path, start: Path) -> Path:
    """Return the run directory after five steps, without any kill."""
    output = small_file.parent / "quiet"
    shutil.copytree(start, output)
    run_ranks(1, train_here, str(small_file), [f"output={output}", f"stop_at_step={END}"])
    return output


def wait_for_deletions() -> None:
    """Let this process wait for a deletion; otherwise the end of the run changes files in a random order with it."""
    from megatron_cpt.checkpoint.saving import saver

    submit = saver.ThreadPoolExecutor.submit

    def submit_and_wait(self: Any, work: Any, *args: Any) -> Any:
        future = submit(self, work, *args)
        if work is saver.delete:
            future.exception()
        return future

    saver.ThreadPoolExecutor.submit = submit_and_wait  # type: ignore[method-assign]


def train_and_die(path: str, output: str, number: int, power_cut: bool, background: bool) -> None:
    """Resume for one step, and die before the n-th change of the run directory."""
    wait_for_deletions()
    Death(Path(output), number, Path(f"{output}.journal"), power_cut=power_cut)
    train_here(path, [f"output={output}", f"stop_at_step={START + 1}", f"checkpoint.async={background}"])


def survives(run: Path, output: Path, number: int, power_cut: bool, background: bool) -> bool:
    """Return whether a process ended before it reached the change that it should die at."""
    try:
        run_ranks(1, train_and_die, str(run), str(output), number, power_cut, background)
    except RankError as error:
        if "ranks [0] died" not in str(error):
            raise
        return False
    return True


def changes(output: Path) -> list[str]:
    """Return the changes of a process, one line each, without the parts that differ from process to process.

    Those parts are the numbers of steps and processes, the order in which a rank syncs its shards, and the order of a
    deletion.
    """
    text = re.sub(r"__\d_\d", "__shard", re.sub(r"\d\d+", "N", Path(f"{output}.journal").read_text()))
    return re.sub(r"(os\.remove .*)/.*", r"\1", text).splitlines()


def valid_steps(output: Path) -> list[int]:
    """Return the steps of the published checkpoints; all of them and `latest` must be valid."""
    folder = checkpoints_folder(output)
    found = list_checkpoints(folder)
    assert {path.name: find_faults(path) for path in found} == {path.name: [] for path in found}
    assert re.fullmatch(r"step-\d{8}\n", (folder / LATEST_FILE).read_text())
    return [int(path.name.removeprefix("step-")) for path in found]


@pytest.mark.parametrize(
    ("power_cut", "background", "every"),
    [
        pytest.param(True, False, 8, id="power-cut"),
        pytest.param(True, False, 1, id="power-cut-each", marks=pytest.mark.long),
        pytest.param(False, False, 1, id="kill", marks=pytest.mark.long),
        pytest.param(True, True, 1, id="power-cut-async", marks=pytest.mark.long),
    ],
)
def test_a_death_before_any_change_of_a_file_costs_one_step_at_most(
    small_file: Path, start: Path, quiet: Path, tmp_path: Path, power_cut: bool, background: bool, every: int
) -> None:
    """The process is killed before changes of the run directory in a start, a step, a save and a deletion.

    Those are the changes around the two renames, which publish a checkpoint and hide the one to delete, and one in
    `every` of the others.
    """

    def train(number: int) -> tuple[Path, bool]:
        output = tmp_path / f"{number}"
        shutil.copytree(start, output)
        return output, survives(small_file, output, number, power_cut, background)

    whole, survived = train(NEVER)
    assert survived
    expected = changes(whole)
    renames = [1 + expected.index(f"os.rename checkpoints/{name}") for name in (".step-N.tmp", "step-N")]
    assert renames == sorted(renames)
    around = {number + offset for number in renames for offset in (-1, 0, 1)}
    numbers = sorted({*range(1, len(expected) + 1, every), *around})

    killed: list[Path] = []
    for number in numbers:
        output, survived = train(number)
        assert not survived
        assert valid_steps(output) in ([2, 3], [2, 3, 4], [3, 4])
        killed.append(output)
    killed_before = [changes(output)[-1] for output in killed]
    if every == 1:
        assert sorted(killed_before) == sorted(expected), "a process was killed before each change"
    published = [4 in valid_steps(output) for output in killed]
    assert published == sorted(published)
    assert published[killed_before.index("os.rename checkpoints/.step-N.tmp") :].count(False) == 1

    runs = [[f"output={output}", f"stop_at_step={END}"] for output in killed]
    run_ranks(1, train_several, str(small_file), runs, timeout=900)
    for output in killed:
        assert differing(newest(quiet), newest(output)) == []
        names = sorted(path.name for path in checkpoints_folder(output).iterdir())
        assert names == [LATEST_FILE, "step-00000004", "step-00000005"], "leftovers of killed processes are deleted"


def start_and_die(path: str, output: str, number: int) -> None:
    """Start a run that saves after step 2, and die before the n-th change of the run directory."""
    Death(Path(output), number, Path(f"{output}.journal"))
    train_here(path, [f"output={output}", "stop_at_step=2", "checkpoint.every=2"])


@pytest.mark.long
def test_a_first_start_killed_before_any_change_starts_over_or_resumes_by_the_same_command(
    small_file: Path, tmp_path: Path
) -> None:
    """Before the first checkpoint nothing is lost, so --restart is not needed."""
    killed: list[Path] = []
    while True:
        output = tmp_path / f"{len(killed) + 1}"
        output.mkdir()
        try:
            run_ranks(1, start_and_die, str(small_file), str(output), len(killed) + 1)
            break
        except RankError as error:
            if "ranks [0] died" not in str(error):
                raise
        killed.append(output)
    assert len(killed) > 20
    run_ranks(1, train_several, str(small_file), [[f"output={path}", "stop_at_step=2"] for path in killed], timeout=900)
    for path in killed:  # not `newest`: a kill before `latest` is written leaves a complete run without it
        ends = [checkpoints_folder(run) / "step-00000002" for run in (output, path)]
        assert differing(*ends) == []
        assert [line["step"] for line in read_metrics(path)] == [1, 2]
