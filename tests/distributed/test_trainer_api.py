"""The trainer as a library: results, hooks of the user, and a caller's process that stays unchanged."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.command import run_command
from tests.helpers.ranks import run_ranks
from tests.helpers.runs import newest, read_metrics

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples" / "api"

UNCHANGED_PROCESS = """
import logging, signal, sys, warnings

import megatron_cpt as cpt

def snapshot():
    loggers = [logging.getLogger(name) for name in (None, "megatron_cpt", "megatron", "megatron.core")]
    return (
        {number: signal.getsignal(number) for number in signal.valid_signals()},
        [(logger.level, logger.propagate, list(logger.handlers), list(logger.filters)) for logger in loggers],
        (id(warnings.filters), list(warnings.filters), warnings.showwarning),
        (sys.stdout, sys.stderr),
    )

class Compare(cpt.Hook):
    steps = 0

    def on_step(self, session):
        Compare.steps += 1
        assert snapshot() == before

run = cpt.load_run(sys.argv[1], [f"output={sys.argv[2]}", "stop_at_step=2"])
Trainer = cpt.Trainer  # imports torch and numpy, which add warnings filters of their own
before = snapshot()
with Trainer(run, hooks=[Compare()]) as trainer:
    result = trainer.fit()
assert snapshot() == before
assert Compare.steps == 2
print(result.status, result.step, result.checkpoint, repr(result.reason))
"""


def _python(*arguments: object, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, timeout=240, check=False, cwd=cwd, env=environment)


def test_a_python_run_leaves_the_process_of_its_caller_unchanged_and_prints_nothing(
    run_file: Path, tmp_path: Path
) -> None:
    done = _python("-c", UNCHANGED_PROCESS, run_file, tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"0 2 {tmp_path}/out/checkpoints/step-00000002 ''\n"
    assert "step 1/" not in done.stderr
    assert "megatron-cpt" not in done.stderr


def _fit(path: str, overrides: list[str], calls: int) -> list[tuple]:
    import signal

    import megatron_cpt as cpt

    class Stop(cpt.Hook):
        def on_step(self, session):
            if session.state.step == 5:
                signal.raise_signal(signal.SIGTERM)

    results = []
    for _ in range(calls):
        run = cpt.load_run(path, overrides)
        with cpt.Trainer(run, hooks=[Stop()], owns_process=True) as trainer:
            result = trainer.fit()
        results.append((result.status, result.step, result.checkpoint and result.checkpoint.name, result.reason))
    return results


def test_the_result_says_how_a_run_ended_and_where_its_checkpoint_is(run_file: Path, tmp_path: Path) -> None:
    (results,) = run_ranks(1, _fit, str(run_file), [f"output={tmp_path}/out", "stop_at_step=7"], 3)
    assert results == [
        (75, 6, "step-00000006", "stopped by SIGTERM"),  # the ranks agree on it in the step after the signal
        (0, 7, "step-00000007", ""),
        (0, 7, "step-00000007", ""),  # nothing was left to do
    ]


def _fit_each(path: str, runs: list[list[str]]) -> list[tuple]:
    return [result for overrides in runs for result in _fit(path, overrides, 1)]


def test_a_run_that_saves_nothing_at_its_end_says_so(run_file: Path, tmp_path: Path) -> None:
    short = ["checkpoint.at_end=false", "phases.general.until.lr=0.5"]
    (results,) = run_ranks(
        1,
        _fit_each,
        str(run_file),
        [
            [f"output={tmp_path}/signal", *short, "tokens=2048"],  # 8 steps
            [f"output={tmp_path}/signal", *short, "tokens=2048"],
            [f"output={tmp_path}/stop", *short, "tokens=2048", "stop_at_step=4"],
            [f"output={tmp_path}/due", *short, "tokens=1024", "checkpoint.every=2"],
            [f"output={tmp_path}/async", *short, "tokens=768", "checkpoint={every: 2, async: true, at_end: false}"],
            [f"output={tmp_path}/none", *short, "tokens=1024"],
        ],
    )
    assert results == [
        (75, 6, "step-00000006", "stopped by SIGTERM"),
        (0, 8, "step-00000006", ""),
        (0, 4, "step-00000004", ""),
        (0, 4, "step-00000004", ""),
        (0, 3, "step-00000002", ""),  # the save in the background is finished first
        (0, 4, None, ""),
    ]
    assert not (tmp_path / "none" / "checkpoints").exists()
    assert [line["step"] for line in read_metrics(tmp_path / "none")] == [1, 2, 3, 4]


def test_two_runs_in_one_process_do_not_see_each_other(run_file: Path, tmp_path: Path) -> None:
    (results,) = run_ranks(1, _fit_two, str(run_file), str(tmp_path))
    assert results == [(3, True), (2, True)]
    assert [line["step"] for line in read_metrics(tmp_path / "b")] == [1, 2]


def _fit_two(path: str, folder: str) -> list[tuple[int, bool]]:
    """Return for each run its last step, and whether the memory of its model was free after it."""
    import weakref

    import megatron_cpt as cpt

    results = []
    for name, stop in (("a", 3), ("b", 2)):
        run = cpt.load_run(path, [f"output={folder}/{name}", f"stop_at_step={stop}", "precision.compute=bf16"])
        with cpt.Trainer(run) as trainer:
            model = weakref.ref(trainer.session.model.chunks[0])
            step = trainer.fit().step
        results.append((step, model() is None))
    return results


def test_after_an_error_in_a_hook_the_process_can_train_again(run_file: Path, tmp_path: Path) -> None:
    """Run it in a process without a process group of its own, as a caller's script is."""
    code = (
        "import sys, megatron_cpt as cpt, torch.distributed as dist\n"
        "class Fail(cpt.Hook):\n"
        "    def on_step(self, session):\n"
        "        raise KeyboardInterrupt\n"
        "for hooks in ([Fail()], []):\n"
        "    run = cpt.load_run(sys.argv[1], [f'output={sys.argv[2]}', 'stop_at_step=1'])\n"
        "    try:\n"
        "        with cpt.Trainer(run, hooks=hooks) as trainer:\n"
        "            print(trainer.fit().step)\n"
        "    except KeyboardInterrupt:\n"
        "        print('interrupted')\n"
        "    assert not dist.is_initialized()\n"
    )
    done = _python("-c", code, run_file, tmp_path / "out")
    assert (done.returncode, done.stdout) == (0, "interrupted\n1\n"), done.stderr
    assert "corrupted checkpoint" not in done.stderr


def test_misuse_says_what_to_give(run_file: Path, tmp_path: Path) -> None:
    import megatron_cpt as cpt

    run = cpt.load_run(run_file, [f"output={tmp_path}/out"])
    with pytest.raises(TypeError, match="give a RunConfig, as load_run returns"):
        cpt.Trainer(str(run_file))
    for hooks in (cpt.Hook(), [cpt.Hook], [object()]):
        with pytest.raises(TypeError, match="give a list of instances of classes derived from Hook"):
            cpt.Trainer(run, hooks=hooks)
    with pytest.raises(cpt.UserError, match="blemd"):
        cpt.Trainer(run, allow="blemd")
    with pytest.raises(RuntimeError, match="use it inside `with Trainer"):
        cpt.Trainer(run).fit()
    assert not (tmp_path / "out").exists()


def test_metrics_have_what_an_operator_asks_for(run_file: Path, base: Path) -> None:
    for line in read_metrics(base):
        assert line["tflops_per_gpu"] > 0
        assert line["mfu"] is None, "a CPU has no known peak"
        assert line["peak_memory_gib"] > 0
        assert line["reserved_memory_gib"] is None
        assert 0 <= line["data_wait_seconds"] + line["sync_wait_seconds"] <= line["step_seconds"]
        assert line["eta"] >= 0
    assert read_metrics(base)[-1]["eta"] == 0


def test_a_hook_of_the_run_yaml_is_called_by_the_command(run_file: Path, tmp_path: Path) -> None:
    (tmp_path / "my_cpt_hooks.py").write_text(
        "import megatron_cpt as cpt\n"
        "class Note(cpt.Hook):\n"
        "    def on_step(self, session):\n"
        "        print('NOTE', session.state.step, flush=True)\n"
    )
    overrides = [f"output={tmp_path}/out", "stop_at_step=2"]
    command = ["-c", "from megatron_cpt.cli import main; import sys; sys.path.remove(''); sys.exit(main())", "train"]
    done = _python(*command, run_file, *overrides, "log.hooks=['my_cpt_hooks:Note']", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n")[:2] == ["NOTE 1", "NOTE 2"]


@pytest.mark.parametrize("entry", ["my_missing_hooks:Note", "json:JSONDecoder", "no-module"])
def test_a_wrong_hook_is_status_2_before_anything_is_written(run_file: Path, tmp_path: Path, entry: str) -> None:
    arguments = ["train", run_file, f"output={tmp_path}/out", f"log.hooks=['{entry}']"]
    done = run_command(arguments, folder=tmp_path)
    assert done.returncode == 2
    assert entry in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def example_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("api")
    done = _python(EXAMPLES / "make_data.py", folder)
    assert done.returncode == 0, done.stderr
    return folder


def test_the_examples_run_in_one_process(example_data: Path) -> None:
    done = _python(EXAMPLES / "train_from_python.py", example_data)
    assert done.returncode == 0, done.stderr
    assert [line.split()[1] for line in done.stdout.splitlines() if line.startswith("step ")] == ["5", "10", "15", "20"]
    result = done.stdout.splitlines()[-1]
    assert result.startswith("RunResult(status=0, step=20, checkpoint=")
    assert "step-00000020" in result

    done = _python(EXAMPLES / "custom_sampler.py", example_data / "text")
    assert done.returncode == 0, done.stderr
    counts = [int(line.split()[0]) for line in done.stdout.splitlines()]
    assert len(counts) == 4
    assert counts == sorted(counts)
    assert counts[0] < counts[-1]


@pytest.mark.long  # test_command.py trains under torchrun
def test_the_example_runs_under_torchrun(example_data: Path, tmp_path: Path) -> None:
    for name in ("text.bin", "text.idx"):
        (tmp_path / name).symlink_to(example_data / name)
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = _python(*torchrun, EXAMPLES / "train_from_python.py", tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("RunResult(status=0, step=20") == 1
    assert newest(tmp_path / "out").name == "step-00000020"
