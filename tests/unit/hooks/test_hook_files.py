"""Files of the hooks, also on a disk that fills up."""

from __future__ import annotations

import contextlib
import resource
import sys
import time
from pathlib import Path
from types import ModuleType, SimpleNamespace

import orjson
import pytest

from megatron_cpt.config.schema import WandbConfig
from megatron_cpt.errors import CptError, UserError
from megatron_cpt.files.jsonl_log import JsonlLog, drop_lines_after
from megatron_cpt.hooks.console import ConsoleHook
from megatron_cpt.hooks.jsonl_files import AnomaliesFile, MetricsFile
from megatron_cpt.hooks.tensorboard import TensorBoardHook
from megatron_cpt.hooks.wandb import WandbHook


@contextlib.contextmanager
def room(size):
    """Limit the files of this process to `size` bytes: a write takes what fits, and the next one fails."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def session(folder, **values):
    return SimpleNamespace(
        output=folder,
        ranks=SimpleNamespace(is_main=True),
        state=SimpleNamespace(step=0),
        is_resumed=False,
        plan=SimpleNamespace(phases=[SimpleNamespace(name="general"), SimpleNamespace(name="qa")]),
        config=SimpleNamespace(name="run", to_dict=dict),
        **values,
    )


def line(step):
    return {"step": step, "phase": "general", "loss": 1.0, "lr": 0.1, "grad_norm": 1.0, "tokens_per_second": 1.0,
            "step_seconds": 2.0, "data_wait_seconds": 0.01, "sync_wait_seconds": 0.5, "tokens": step,
            "tflops_per_gpu": 1.0, "mfu": None, "peak_memory_gib": 1.0, "reserved_memory_gib": None, "eta": 1.0,
            "loss_by_source": {"web": 1.0}, "samples_by_source": {"web": step}}  # fmt: skip


def test_a_line_that_does_not_fit_leaves_the_file_as_it_was_and_names_it(tmp_path):
    path = tmp_path / "metrics.jsonl"
    file = JsonlLog(path)
    file.append({"step": 1})
    with room(15), pytest.raises(CptError, match=r"metrics\.jsonl: cannot be written: File too large; free some space"):
        file.append({"step": 2})
    assert path.read_bytes() == b'{"step":1}\n'
    file.append({"step": 2})
    file.close()
    assert path.read_bytes() == b'{"step":1}\n{"step":2}\n'


def test_metrics_and_anomalies_stay_whole_lines_on_a_full_disk(tmp_path):
    metrics, anomalies = MetricsFile(), AnomaliesFile()
    files = [tmp_path / "metrics.jsonl", tmp_path / "anomalies.jsonl"]
    metrics.on_start(session(tmp_path))
    anomalies.on_start(session(tmp_path))
    metrics.on_metrics(session(tmp_path), line(1))
    anomalies.on_anomaly(session(tmp_path), line(1))
    for file, write in zip(files, (metrics.on_metrics, anomalies.on_anomaly), strict=True):
        with room(file.stat().st_size + 20), pytest.raises(CptError, match=rf"{file.name}: cannot be written"):
            write(session(tmp_path), line(2))
    metrics.on_end(session(tmp_path))
    assert [[orjson.loads(text)["step"] for text in file.read_bytes().splitlines()] for file in files] == [[1], [1]]
    assert all(file.read_bytes().endswith(b"\n") for file in files)


def test_lines_after_a_step_and_half_a_line_go(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step":1}\n{"step":2}\n{"step":3}\n{"st')
    drop_lines_after(path, 2)
    assert path.read_bytes() == b'{"step":1}\n{"step":2}\n'


def test_a_folder_of_tensorboard_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "tensorboard").write_text("a file")
    hook = TensorBoardHook()
    with pytest.raises(CptError, match=r"tensorboard: cannot be written: File exists"):
        hook.on_start(session(tmp_path))
    hook.on_end(session(tmp_path))


def write_until_its_thread_has_failed(hook, run):
    for step in range(1, 1000):
        hook.on_metrics(run, line(step))
        time.sleep(0.001)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # its writer's thread
def test_tensorboard_on_a_full_disk_names_its_folder(tmp_path):
    hook = TensorBoardHook()
    hook.on_start(session(tmp_path))
    with room(500), pytest.raises(CptError, match=r"tensorboard: cannot be written: File too large"):
        write_until_its_thread_has_failed(hook, session(tmp_path))
    with pytest.raises(CptError, match=r"tensorboard: cannot be written"):
        hook.on_end(session(tmp_path))


def test_wandb_that_is_missing_or_refuses_is_one_message(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match=r"pip install -e '.*\[wandb\]'"):
        WandbHook(WandbConfig(project="p"))

    class Error(Exception):  # as wandb.Error is named
        pass

    def init(**_):
        raise Error("No API key configured")

    package = ModuleType("wandb")
    package.Error, package.init = Error, init
    monkeypatch.setitem(sys.modules, "wandb", package)
    hook = WandbHook(WandbConfig(project="p"))
    with pytest.raises(CptError, match=r"log\.wandb: No API key configured; run `wandb login`"):
        hook.on_start(session(tmp_path))
    hook.on_end(session(tmp_path))


def test_the_console_prints_the_use_of_the_hardware(capsys):
    hook = ConsoleHook()
    hook._is_main = True
    run = SimpleNamespace(plan=SimpleNamespace(steps=100))
    values = {"tokens_per_second": 1500.0, "peak_memory_gib": 61.26, "eta": 3723.4}
    hook.on_metrics(run, {**line(7), **values, "mfu": 0.4123})
    hook.on_metrics(run, {**line(8), **values, "mfu": None, "data_wait_seconds": 0.5})
    first, second = capsys.readouterr().err.splitlines()
    assert first == (
        "step   7/100  general  loss 1.0000  lr 1.000e-01  grad 1.000  1.5K tokens/s  MFU 41.2%  peak 61.3 GiB  "
        "1:02:03 left"
    )
    assert "MFU" not in second
    assert "  1.5K tokens/s  data wait 25%  peak" in second


class Scalars:
    def __init__(self):
        self.written = {}

    def add_scalar(self, name, value, step):
        self.written[name, step] = value

    def add_text(self, name, text, step):
        self.written[name, step] = text


def test_tensorboard_gets_the_use_of_the_hardware_where_it_is_known(tmp_path):
    hook = TensorBoardHook()
    hook._writer, hook._folder = Scalars(), tmp_path
    hook.on_metrics(session(tmp_path), {**line(1), "mfu": 0.25})
    hook.on_metrics(session(tmp_path), line(2))
    assert hook._writer.written["train/mfu", 1] == 0.25
    assert ("train/mfu", 2) not in hook._writer.written
    assert {name for name, step in hook._writer.written if step == 2} >= {
        "train/eta", "train/peak_memory_gib", "train/tflops_per_gpu",
    }  # fmt: skip


def test_tensorboard_gets_the_number_of_the_phase_on_each_line_and_its_name_at_each_change(tmp_path):
    hook = TensorBoardHook()
    hook._writer, hook._folder = Scalars(), tmp_path
    for step, phase in ((1, "general"), (2, "general"), (3, "qa"), (4, "qa")):
        hook.on_metrics(session(tmp_path), {**line(step), "phase": phase})
    assert [hook._writer.written["train/phase", step] for step in (1, 2, 3, 4)] == [1, 1, 2, 2]
    assert {key: text for key, text in hook._writer.written.items() if key[0] == "phase"} == {
        ("phase", 1): "general",
        ("phase", 3): "qa",
    }


def test_a_run_that_starts_over_after_one_without_checkpoints_says_so(tmp_path, caplog):
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step":1}\n')
    for expected in (1, 1):  # the second run finds an empty file
        hook = MetricsFile()
        hook.on_start(session(tmp_path))
        hook.on_end(session(tmp_path))
        assert caplog.text.count("left no checkpoint, so training starts over") == expected
    assert (tmp_path / "metrics.jsonl").read_bytes() == b""


def _stop(reason, *, newest, capsys):
    hook, run = ConsoleHook(), session("out", origin=None)
    run.state.step = 12
    hook._is_main, hook._newest = True, newest
    hook.on_stop(run, reason)
    return capsys.readouterr().err


def test_the_console_says_what_the_same_command_does_after_an_end_without_a_save(capsys):
    assert _stop("", newest=Path("out/step-00000012"), capsys=capsys) == ""
    assert _stop("", newest=Path("out/step-00000010"), capsys=capsys) == (
        "step 12 was not saved (checkpoint.at_end: false); the same command resumes from out/step-00000010\n"
    )
    assert "; the same command starts over\n" in _stop("", newest=None, capsys=capsys)
    assert "stopped by SIGTERM: step 12 is saved" in _stop("stopped by SIGTERM", newest=None, capsys=capsys)


def test_an_evaluation_reaches_console_tensorboard_and_wandb(tmp_path, capsys):
    metrics = {"acc": 0.5, "acc_stderr": 0.1, "bits_per_byte": 1.25}
    found = {"step": 7, "evaluation": {"piqa": metrics}, "evaluation_seconds": 63.0}
    console, tensorboard, wandb = ConsoleHook(), TensorBoardHook(), object.__new__(WandbHook)
    console._is_main, tensorboard._writer, tensorboard._folder, wandb._run = True, Scalars(), tmp_path, Log()
    for hook in (console, tensorboard, wandb):
        hook.on_evaluation(session(tmp_path), found)
    printed = capsys.readouterr().err
    assert printed == "step 7  evaluation in 1:03\n  piqa  bits_per_byte 1.2500  acc 0.5000\n"
    assert tensorboard._writer.written["evaluation/piqa/acc_stderr", 7] == 0.1
    assert wandb._run.lines == [({"evaluation": {"piqa": metrics}}, 7)]


def test_measurements_of_the_moving_average_have_names_of_their_own(tmp_path, capsys):
    losses = {"step": 7, "validation": {"web": 2.5}, "validation_ema": {"web": 2.25}}
    scores = {"step": 7, "evaluation": {"piqa": {"acc": 0.5}}, "evaluation_ema": {"piqa": {"acc": 0.75}}}
    console, tensorboard, wandb = ConsoleHook(), TensorBoardHook(), object.__new__(WandbHook)
    console._is_main, tensorboard._writer, tensorboard._folder, wandb._run = True, Scalars(), tmp_path, Log()
    for hook in (console, tensorboard, wandb):
        hook.on_validation(session(tmp_path), losses)
        hook.on_evaluation(session(tmp_path), {**scores, "evaluation_seconds": 1.0})
    printed = capsys.readouterr().err
    assert "step 7  held-out loss of the EMA  web 2.2500\n" in printed
    assert "  piqa (EMA)  acc 0.7500\n" in printed
    written = tensorboard._writer.written
    assert (written["validation/web", 7], written["validation_ema/web", 7]) == (2.5, 2.25)
    assert (written["evaluation/piqa/acc", 7], written["evaluation_ema/piqa/acc", 7]) == (0.5, 0.75)
    assert [sorted(values) for values, _ in wandb._run.lines] == [
        ["validation", "validation_ema"],
        ["evaluation", "evaluation_ema"],
    ]


class Log:
    """Stand-in for a W&B run."""

    def __init__(self):
        self.lines = []

    def log(self, values, *, step):
        self.lines.append((values, step))
