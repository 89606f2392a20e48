"""`megatron-cpt train` passes on what it was given; what it does then is tested elsewhere."""

from __future__ import annotations

import sys
from types import ModuleType

import pytest

from megatron_cpt.cli import main
from megatron_cpt.errors import RefusedError


@pytest.fixture
def calls(monkeypatch):
    """Stands in for the training side, which would load torch and megatron-core."""
    seen, run, hooks = [], ModuleType("megatron_cpt.train.run"), ModuleType("megatron_cpt.hooks")
    hooks.build_hooks = object()

    def run_training(path, overrides, allow, make_hooks):
        assert make_hooks is hooks.build_hooks
        seen.append((path, list(overrides), list(allow)))
        if "refuse" in allow:
            raise RefusedError("checkpoint [3]: broken")
        return 75

    run.run_training = run_training
    monkeypatch.setitem(sys.modules, "megatron_cpt.train", ModuleType("megatron_cpt.train"))
    monkeypatch.setitem(sys.modules, "megatron_cpt.train.run", run)
    monkeypatch.setitem(sys.modules, "megatron_cpt.hooks", hooks)
    return seen


def test_arguments_and_status_are_passed_on(calls):
    assert main(["train", "run.yaml", "a.b=1", "c=2", "--allow", "blend", "data"]) == 75
    assert main(["train", "--allow", "blend", "data", "run.yaml", "a.b=1"]) == 75
    assert main(["train", "run.yaml"]) == 75
    assert calls == [
        ("run.yaml", ["a.b=1", "c=2"], ["blend", "data"]),
        ("run.yaml", ["a.b=1"], ["blend", "data"]),
        ("run.yaml", [], []),
    ]


def test_what_is_refused_is_status_3(calls, capsys):
    assert main(["train", "run.yaml", "--allow", "refuse"]) == 3
    assert capsys.readouterr().err == "megatron-cpt: error: checkpoint [3]: broken\n"
