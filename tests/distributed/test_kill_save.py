"""A life of a run that ends before any one of its operations on files: what is published is sound, and the next life
goes on to the same bits."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

from megatron_cpt.checkpoint.layout import LATEST_FILE, checkpoints_folder, list_checkpoints
from megatron_cpt.checkpoint.manifest import find_faults
from tests.helpers.checkpoints import differing
from tests.helpers.faults import Death
from tests.helpers.ranks import RankError, run_ranks
from tests.helpers.runs import newest, small_run, train_here, train_several

SMALL = {"preset": "tiny_llama", "layers": 1, "hidden": 64, "ffn_hidden": 96, "vocab": 257}
START, END = 3, 5  # the life in between goes on from step 3, saves step 4, and deletes step 2


@pytest.fixture(scope="module")
def small_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that saves every step and keeps two checkpoints, so that every save also deletes one."""
    return small_run(tmp_path_factory.mktemp("kill-save"), model=SMALL, checkpoint={"every": 1, "keep": 2})


@pytest.fixture(scope="module")
def start(small_file: Path) -> Path:
    """The run after three steps."""
    output = small_file.parent / "start"
    run_ranks(1, train_here, str(small_file), [f"output={output}", f"stop_at_step={START}"])
    return output


@pytest.fixture(scope="module")
def quiet(small_file: Path, start: Path) -> Path:
    """The run after five."""
    output = small_file.parent / "quiet"
    shutil.copytree(start, output)
    run_ranks(1, train_here, str(small_file), [f"output={output}", f"stop_at_step={END}"])
    return output


def train_and_die(path: str, output: str, number: int, power_cut: bool, background: bool) -> None:
    """Go on by one step, and die before the n-th change of the run directory."""
    Death(Path(output), number, Path(f"{output}.journal"), power_cut=power_cut)
    train_here(path, [f"output={output}", f"stop_at_step={START + 1}", f"checkpoint.async={background}"])


def survives(run: Path, output: Path, number: int, power_cut: bool, background: bool) -> bool:
    """Whether a life had fewer changes than the one it was to die at."""
    try:
        run_ranks(1, train_and_die, str(run), str(output), number, power_cut, background)
    except RankError as error:
        if "ranks [0] died" not in str(error):
            raise
        return False
    return True


def changes(output: Path) -> list[str]:
    """What a life did to which file, without what differs from life to life.

    That is the numbers of steps and processes, which of its shards a rank syncs first, and the order of a deletion.
    """
    text = re.sub(r"__\d_\d", "__shard", re.sub(r"\d\d+", "N", Path(f"{output}.journal").read_text()))
    return re.sub(r"(os\.remove .*)/.*", r"\1", text).splitlines()


def sound_steps(output: Path) -> list[int]:
    """Steps of the published checkpoints, every one of which must be whole, as must be what `latest` says."""
    folder = checkpoints_folder(output)
    found = list_checkpoints(folder)
    assert {path.name: find_faults(path) for path in found} == {path.name: [] for path in found}
    assert re.fullmatch(r"step-\d{8}\n", (folder / LATEST_FILE).read_text())
    return [int(path.name.removeprefix("step-")) for path in found]


@pytest.mark.parametrize(
    ("power_cut", "background", "resume_every"),
    [
        pytest.param(True, False, 3, id="power-cut"),
        pytest.param(True, False, 1, id="power-cut-each", marks=pytest.mark.long),
        pytest.param(False, False, 1, id="kill", marks=pytest.mark.long),
        pytest.param(True, True, 1, id="power-cut-async", marks=pytest.mark.long),
    ],
)
def test_a_death_before_any_change_of_a_file_costs_one_step_at_most(
    small_file: Path, start: Path, quiet: Path, tmp_path: Path, power_cut: bool, background: bool, resume_every: int
) -> None:
    """Every change of the run directory in a start, a step, a save and a deletion is once the one that did not come."""
    dead: list[Path] = []
    while True:
        output = tmp_path / f"{len(dead) + 1}"
        shutil.copytree(start, output)
        if survives(small_file, output, len(dead) + 1, power_cut, background):
            break
        assert sound_steps(output) in ([2, 3], [2, 3, 4], [3, 4])
        dead.append(output)
    died_at = [changes(output)[-1] for output in dead]
    assert sorted(died_at) == sorted(changes(output)), "each change of the life that survived was once the end of one"
    published = [4 in sound_steps(output) for output in dead]
    assert published == sorted(published)
    assert published[died_at.index("os.rename checkpoints/.step-N.tmp") :].count(False) == 1
    assert died_at.index("os.rename checkpoints/.step-N.tmp") < died_at.index("os.rename checkpoints/step-N")

    resumed = dead[::resume_every]
    runs = [[f"output={output}", f"stop_at_step={END}"] for output in resumed]
    run_ranks(1, train_several, str(small_file), runs, timeout=900)
    for output in resumed:
        assert differing(newest(quiet), newest(output)) == []
        names = sorted(path.name for path in checkpoints_folder(output).iterdir())
        assert names == [LATEST_FILE, "step-00000004", "step-00000005"], "what the dead left behind is cleared away"
