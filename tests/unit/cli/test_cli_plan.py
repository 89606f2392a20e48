"""Command `megatron-cpt plan`, in-process and as a subprocess."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from megatron_cpt.cli import main
from megatron_cpt.errors import install_command

# The sources of the small run declare their sizes, so most tests need no data.


def command(*arguments, **options) -> subprocess.CompletedProcess[str]:
    argv = [sys.executable, "-m", "megatron_cpt", *map(str, arguments)]
    return subprocess.run(argv, capture_output=True, text=True, timeout=60, check=False, **options)


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch, repository):
    """Run commands in an empty folder, where any file they leave was written by mistake."""
    monkeypatch.setenv("PYTHONPATH", str(repository))
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")


def test_the_plan_of_a_valid_run(run_data, write_run, capsys):
    assert main(["plan", str(write_run(run_data))]) == 0
    captured = capsys.readouterr()
    assert "small: 51.2K tokens = 100 steps" in captured.out
    assert captured.err == ""
    assert os.listdir() == []


def test_json_is_the_only_output(run_data, write_run, capsys):
    assert main(["plan", str(write_run(run_data)), "tokens=5120", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["steps"] == 10
    assert plan["phases"][0]["name"] == "general"
    assert list(plan["phases"][1]["sources"]) == ["web", "code", "qa"]


def test_plot_beside_json(run_data, write_run, capsys):
    assert main(["plan", str(write_run(run_data)), "--plot", "plan.png", "--json"]) == 0
    assert os.listdir() == ["plan.png"]
    assert json.loads(capsys.readouterr().out)["steps"] == 100


def test_gpus(run_data, write_run, capsys):
    path = str(write_run(run_data))
    assert main(["plan", path, "--gpus", "4", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["layout"]["data_parallel"] == 4
    assert main(["plan", path, "--gpus", "3"]) == 2
    assert "batch.global: 8 is not a multiple of batch.micro: 2 x 3 replicas" in capsys.readouterr().err


def test_a_named_gpu(run_data, write_run, capsys):
    path = str(write_run(run_data))
    assert main(["plan", path, "--gpus", "4", "--gpu", "h100", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["steps"] == 100
    assert (plan["cluster"]["gpu"]["name"], plan["cluster"]["num_gpus"]) == ("h100", 4)
    assert plan["cluster"]["memory_per_gpu_gib"] > plan["memory_per_gpu_gib"]  # includes the memory of CUDA and NCCL
    assert len(plan["memory_by_stage_gib"]) == len(plan["cluster"]["memory_by_stage_gib"]) == 1
    assert main(["plan", path, "--gpu", "h100"]) == 0
    assert "1 x NVIDIA H100 80GB SXM" in capsys.readouterr().out
    assert main(["plan", path, "--gpu", "abacus"]) == 2
    assert "choose one of a100, h100, h200, b200" in capsys.readouterr().err


def test_advice(run_data, write_run, capsys):
    path = str(write_run(run_data))
    assert main(["plan", path, "--gpus", "2", "--gpu", "h100", "--advise"]) == 0
    assert "best of each split that fits 79.6 GiB" in capsys.readouterr().out
    assert main(["plan", path, "--gpus", "3", "--gpu", "h100", "--advise", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["steps"] == 100
    advice = plan["advice"]
    assert advice["current"] is None  # 3 replicas do not divide the batch
    assert [entry["pipeline_layout"] for entry in advice["ranking"]] == [[1, 2, 1]]  # of one replica
    assert advice["other_batch"]["global_batch"] == 6


def test_the_schema_needs_no_run(capsys):
    assert main(["plan", "--schema"]) == 0
    assert json.loads(capsys.readouterr().out)["title"] == "RunConfig"


WRONG = {
    "an unknown key": (["bacth.global=8"], "bacth: not a known key; did you mean batch?"),
    "heads that tensor parallelism does not divide": (
        ["parallel.tensor=3", "model.ffn_hidden=513"],
        "parallel.tensor: 3 does not divide model.heads: 8",
    ),
    "a batch that does not divide": (["batch.micro=3"], "batch.micro: 3 does not divide batch.global: 8"),
    "a missing file": (["sources.web={path: nowhere/web}"], "sources.web.path: no such file: nowhere/web.idx"),
    "a weight of zero": (["phases.general.blend.web=0"], "blend.web (phase general): 0 is not a positive weight"),
    "a negative weight": (
        ["phases.general.blend.code=-0.4"],
        "blend.code (phase general): -0.4 is not a positive weight",
    ),
    "a weight that is not a source": (
        ["phases.qa.blend.cdoe=0.01"],
        "blend.cdoe (phase qa): not a source; did you mean code?",
    ),
    "a source that runs out": (
        ["sources.qa.tokens=300"],
        "sources.qa.max_epochs: 4: the run reads 1.408K of its 300 tokens",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_each_mistake_is_one_clear_message(run_data, write_run, capsys, case):
    overrides, text = WRONG[case]
    assert main(["plan", str(write_run(run_data)), *overrides]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("megatron-cpt: error: ")
    assert "1 problem\n" in captured.err
    assert text in captured.err


def test_all_mistakes_at_once_through_the_real_command(run_data, write_run):
    overrides = [override for case in WRONG for override in WRONG[case][0]]
    result = command("plan", write_run(run_data), *overrides)
    assert result.returncode == 2
    assert result.stdout == ""
    assert "Traceback" not in result.stderr
    assert f"{len(WRONG)} problems" in result.stderr.splitlines()[0]
    for _, text in WRONG.values():
        assert text.split(" of its ")[0] in result.stderr
    assert os.listdir() == []


HEAVY = ("torch", "megatron", "transformer_engine", "matplotlib", "tensorboard", "tokenizers", "sentencepiece")

# A finder that refuses some packages stands for an environment in which they are not installed.
WITHOUT_PACKAGES = """
import sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in sys.argv[1].split(","):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Refuse())
from megatron_cpt.cli import main
sys.exit(main(sys.argv[2:]))
"""


def without(packages, *arguments) -> subprocess.CompletedProcess[str]:
    argv = [sys.executable, "-c", WITHOUT_PACKAGES, ",".join(packages), *map(str, arguments)]
    return subprocess.run(argv, capture_output=True, text=True, timeout=60, check=False)


def test_planning_loads_neither_torch_nor_megatron(run_data, write_run):
    code = (
        "import sys; from megatron_cpt.cli import main; status = main(sys.argv[1:]); "
        f"heavy = {set(HEAVY)} & set(sys.modules); "
        "sys.exit(f'loaded: {heavy}' if heavy else status)"
    )
    argv = [sys.executable, "-c", code, "plan", str(write_run(run_data)), "--json"]
    result = subprocess.run(argv, capture_output=True, text=True, timeout=60, check=False)
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["steps"] == 100


@pytest.mark.parametrize("options", [[], ["--gpus", "2"], ["--gpus", "2", "--gpu", "h100", "--advise"]])
def test_planning_needs_neither_torch_nor_megatron(run_data, write_run, options):
    path = write_run(run_data)
    result = without(HEAVY, "plan", path, *options, "--json")
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["steps"] == 100
    result = without(HEAVY, "plan", path, *options)
    assert result.returncode == 0, result.stderr
    assert result.stdout
    assert result.stderr == ""


def test_planning_reads_existing_files_without_torch(run_data, write_run, counting_dataset):
    counting_dataset("web", 100_000)
    path = write_run(run_data)
    data = str(path.parent / "web")
    result = without(HEAVY, "plan", path, f"sources.web.path={data}", "sources.web.tokens=", "--json")
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["sources"]["web"]["size"] == 100_000


def test_a_plot_without_matplotlib_is_one_message(run_data, write_run):
    result = without(["matplotlib"], "plan", write_run(run_data), "--plot", "plan.png")
    assert result.returncode == 2
    assert result.stdout == ""
    (message,) = result.stderr.splitlines()
    assert message.startswith("megatron-cpt: error: --plot plan.png: plots need matplotlib")
    assert install_command("plot") in message
    assert os.listdir() == []


def test_a_plot_of_lengths_without_matplotlib_is_one_message(tmp_path, counting_dataset):
    counting_dataset("web", 100)
    result = without(["matplotlib"], "inspect", tmp_path / "web", "--plot", "lengths.png")
    assert result.returncode == 2
    assert result.stdout == ""
    assert install_command("plot") in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert os.listdir() == []


def test_brackets_are_printed_unchanged(capsys):
    assert main(["plan", "[bold]no/such[/bold].yaml"]) == 2
    assert "megatron-cpt: error: [bold]no/such[/bold].yaml: cannot be read" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["plan"], "give the path of a run.yaml"),
        (["plan", "run.yaml", "--nope"], "No such option"),
        (["plan", "run.yaml", "--gpus", "many"], "Invalid value for '--gpus'"),
        (["plan", "run.yaml", "--gpus", "0"], "Invalid value for '--gpus'"),
        (["plan", "run.yaml", "--advise", "--gpus", "8"], "needs --gpus N and --gpu NAME"),
        (["nope"], "No such command"),
        (["train"], "Missing argument"),
        (["preprocess", "--input", "x"], "Missing option"),
        (["preprocess", "--input", "--key", "x"], "--input: give at least one value"),
    ],
)
def test_mistakes_on_the_command_line_itself(capsys, arguments, text):
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert text in captured.err
    assert "Traceback" not in captured.err


@pytest.mark.parametrize("arguments", [["--help"], ["plan", "--help"], ["train", "--help"], ["preprocess", "--help"]])
def test_help(capsys, arguments):
    assert main(arguments) == 0
    assert "Usage: megatron-cpt" in capsys.readouterr().out


def test_version(capsys):
    from megatron_cpt import __version__

    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"megatron-cpt {__version__}\n"


def test_a_closed_pipe_is_no_error(run_data, write_run):
    """Run as in `megatron-cpt plan run.yaml | head -1`."""
    reader, writer = os.pipe()
    os.close(reader)
    argv = [sys.executable, "-m", "megatron_cpt", "plan", str(write_run(run_data))]
    result = subprocess.run(argv, stdout=writer, stderr=subprocess.PIPE, text=True, timeout=60, check=False)
    os.close(writer)
    assert result.stderr == ""
    assert result.returncode == 1


def test_an_interrupt_is_status_130(run_data, write_run, monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("megatron_cpt.prepare.prepare_run", interrupt)
    assert main(["plan", str(write_run(run_data))]) == 130


def test_a_defect_of_ours_keeps_its_traceback(run_data, write_run, monkeypatch):
    def fail(*_, **__):
        raise ZeroDivisionError("ours")

    monkeypatch.setattr("megatron_cpt.prepare.prepare_run", fail)
    with pytest.raises(ZeroDivisionError, match="ours"):
        main(["plan", str(write_run(run_data))])
