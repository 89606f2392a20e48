"""Outputs that cannot be written are found before any work is done for them, as the user's mistake."""

from __future__ import annotations

import os
import subprocess

import pytest
import yaml

from megatron_cpt.cli import main
from megatron_cpt.errors import ConfigError
from megatron_cpt.files import output_path
from megatron_cpt.files.atomic import write_output
from megatron_cpt.files.output_path import output_problem
from megatron_cpt.prepare import prepare_run

LONG = "n" * 300
BAD = {
    "new/" + LONG: " bytes, too many for the file system",
    "/".join(["n" * 200] * 21): "too many for a path",
    "file/new": "file is not a folder",
    "a\0b": "holds a zero byte",
}


@pytest.fixture
def place(tmp_path, monkeypatch):
    """Make the working folder one with a file in it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("kept")
    (tmp_path / "text.jsonl").write_text('{"text": "one"}\n')
    return tmp_path


@pytest.mark.parametrize("output", BAD)
def test_what_is_wrong_is_said_and_nothing_is_created(place, output):
    assert BAD[output] in output_problem(output)
    assert sorted(os.listdir(place)) == ["file", "text.jsonl"]


def test_good_outputs(place):
    (place / "folder").mkdir()
    for output in ("new", "new/new", "folder", "folder/new", str(place / "folder")):
        assert output_problem(output) is None


@pytest.mark.parametrize(("flags", "reason"), [(0, "not writable for this user"), (os.ST_RDONLY, "read-only file")])
def test_no_permission(place, monkeypatch, flags, reason):
    class Disk:
        f_flag = flags

    monkeypatch.setattr(output_path.os, "access", lambda path, mode: False)
    monkeypatch.setattr(output_path.os, "statvfs", lambda path: Disk)
    assert reason in output_problem("new")


@pytest.mark.parametrize("output", [output for output in BAD if "\0" not in output])
@pytest.mark.parametrize("command", ["preprocess", "join", "merge", "split", "import", "export"])
def test_every_command_finds_it_first(place, capsys, command, output):
    arguments = {
        "preprocess": ["preprocess", "--input", "text.jsonl", "--tokenizer", "byte", "--output-prefix", output],
        "join": ["preprocess", "--join", "2", "--output-prefix", output],
        "merge": ["merge", "--input", "data", "--output-prefix", output],
        "split": ["split", "--input", "data", "--fraction", "0.5", "--held-out-prefix", output],
        "import": ["convert", "import", ".", output],
        "export": ["convert", "export", ".", output],
    }[command]
    assert main(["preprocess", "--input", "text.jsonl", "--tokenizer", "byte", "--output-prefix", "data"]) == 0
    capsys.readouterr()
    before = sorted(os.listdir(place))
    assert main(arguments) == 2
    assert BAD[output] in capsys.readouterr().err
    assert sorted(os.listdir(place)) == before


# A NUL is refused by the YAML reader.
@pytest.mark.parametrize("output", ["file", *(name for name in BAD if "\0" not in name)])
def test_a_run_is_refused_before_its_model_is_built(place, run_data, write_run, counting_dataset, output):
    for name, source in run_data["sources"].items():
        counting_dataset(name, 20_000)
        source.pop("tokens", None)
        source["path"] = str(place / name)
    run_data["output"] = output
    path = write_run(run_data)
    assert yaml.safe_load(path.read_text())["output"] == output
    with pytest.raises(ConfigError, match=r"output: "):
        prepare_run(path, need_files=True)
    prepare_run(path, need_files=False)  # a plan needs no output


def test_an_output_behind_a_link_is_written_and_the_link_stays(tmp_path):
    (tmp_path / "target").write_text("old")
    (tmp_path / "link").symlink_to("target")
    write_output(tmp_path / "link", "new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "target").read_text() == "new"


def test_a_pipe_is_written_to_and_not_replaced(tmp_path):
    """Before, `report --output /dev/stdout` replaced the device by a file."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = subprocess.Popen(["cat", pipe], stdout=subprocess.PIPE)
    write_output(pipe, "text")
    assert reader.communicate(timeout=60)[0] == b"text"
    assert pipe.is_fifo()
