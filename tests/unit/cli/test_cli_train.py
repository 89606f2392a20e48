"""`megatron-cpt train` passes its arguments to the trainer; the training itself is tested elsewhere."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace

import pytest

from megatron_cpt import prepare
from megatron_cpt.cli import main
from megatron_cpt.errors import RefusedError


@pytest.fixture
def calls(monkeypatch):
    """Stand-in for the trainer, which would load megatron-core; returns the list of calls."""
    seen, module = [], ModuleType("megatron_cpt.train.trainer")

    class Trainer:
        def __init__(self, prepared, *, allow, restart, console, owns_process):
            assert console
            assert owns_process
            seen.append((*prepared, list(allow), restart))

        def __enter__(self):
            if "refuse" in seen[-1][2]:
                raise RefusedError("checkpoint [3]: corrupt")
            return self

        def __exit__(self, *_):
            pass

        def fit(self):
            return SimpleNamespace(status=75)

    def prepare_run(path, overrides, *, need_files, num_gpus):
        assert need_files
        assert num_gpus == 1
        return str(path), list(overrides)

    module.Trainer = Trainer
    monkeypatch.setitem(sys.modules, "megatron_cpt.train.trainer", module)
    monkeypatch.setattr(prepare, "prepare_run", prepare_run)
    return seen


def test_arguments_and_status_are_passed_on(calls):
    assert main(["train", "run.yaml", "a.b=1", "c=2", "--allow", "blend", "data"]) == 75
    assert main(["train", "--allow", "blend", "data", "run.yaml", "a.b=1"]) == 75
    assert main(["train", "run.yaml", "--restart"]) == 75
    assert calls == [
        ("run.yaml", ["a.b=1", "c=2"], ["blend", "data"], False),
        ("run.yaml", ["a.b=1"], ["blend", "data"], False),
        ("run.yaml", [], [], True),
    ]


def test_a_refused_checkpoint_is_status_3(calls, capsys):
    assert main(["train", "run.yaml", "--allow", "refuse"]) == 3
    assert capsys.readouterr().err == "megatron-cpt: error: checkpoint [3]: corrupt\n"
