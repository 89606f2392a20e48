"""Little memory, few file descriptors, a full disk: one message, and the same command resumes."""

from __future__ import annotations

import errno
import json
import resource
import subprocess
import sys

import numpy as np
import pytest
import torch

from megatron_cpt.cli import main
from megatron_cpt.data.preprocess import assemble, workers
from megatron_cpt.errors import CptError
from megatron_cpt.files.system_errors import os_errors_as_cpt_errors


@pytest.fixture
def command(tmp_path, monkeypatch) -> list[str]:
    """Return the arguments that encode a small file."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": f"text {n}"}) + "\n" for n in range(100)))
    return ["preprocess", "--input", "a.jsonl", "--output-prefix", "p", "--tokenizer", "byte", "--shuffle", "1"]


def test_out_of_memory_is_one_message(command, tmp_path, monkeypatch, capsys):
    def fail(*arguments, **options):
        np.empty(1 << 60, np.uint8)

    monkeypatch.setattr(workers.Encoder, "__call__", fail)
    assert main(command) == 1
    (line,) = capsys.readouterr().err.strip().splitlines()[-1:]
    assert "out of memory: Unable to allocate" in line
    assert "fewer --workers" in line
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    assert main(command) == 0


def test_torch_out_of_memory_is_one_message():
    reason = r"out of memory: (can't allocate|not enough) memory"
    with pytest.raises(CptError, match=reason), os_errors_as_cpt_errors():
        torch.empty(1 << 58, dtype=torch.uint8)
    with pytest.raises(RuntimeError, match="another"), os_errors_as_cpt_errors():
        raise RuntimeError("another one keeps its traceback")


@pytest.mark.parametrize("name", ["write_index", "write_atomically"])
def test_a_disk_that_fills_up_at_the_end_names_its_file_and_what_is_kept(command, tmp_path, monkeypatch, capsys, name):
    def fail(path, *arguments, **options):
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr(assemble, name, fail)
    assert main(command) == 1
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert "p.preprocess/out.0.00000." in line
    assert "No space left on device; free some space on the disk. Finished parts are kept in p.preprocess" in line
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    assert main(command) == 0


def test_few_file_descriptors_are_one_message(command, tmp_path):
    code = (
        "import resource, sys\nfrom megatron_cpt.cli import main\n"
        "import megatron_cpt.data.preprocess.pipeline, pyarrow, megatron_cpt.cli.encoding_progress\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (int(sys.argv[1]), 4096))\nsys.exit(main(sys.argv[2:]))\n"
    )
    for limit in (7, 12):
        arguments = [sys.executable, "-c", code, str(limit), *command, "--overwrite", "--workers", "2"]
        ended = subprocess.run(arguments, check=False, capture_output=True, text=True, timeout=300)
        assert "Traceback" not in ended.stderr, ended.stderr
        assert ended.returncode in (0, 1), ended.stderr
        if ended.returncode:
            assert "Too many open files; raise the limit on open files (ulimit -n)" in ended.stderr
    assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] > 12
