"""Hooks named in run.yaml, and the composite that forwards events."""

from __future__ import annotations

import sys

import pytest

from megatron_cpt.config import draft_config
from megatron_cpt.errors import UserError
from megatron_cpt.hooks import Hook, HookList, load_hook

EVENTS = {
    "on_start": (),
    "on_step_start": (),
    "on_step": (),
    "on_metrics": ({"step": 1},),
    "on_anomaly": ({"step": 1},),
    "on_validation": ({"step": 1},),
    "on_evaluation": ({"step": 1},),
    "on_checkpoint": ("path",),
    "on_stop": ("reason",),
    "on_end": (),
}


def make_recorder(name, calls):
    return type("Recorder", (Hook,), {
        event: (lambda self, *args, event=event: calls.append((name, event, args))) for event in EVENTS
    })()  # fmt: skip


@pytest.mark.parametrize("event", EVENTS)
def test_every_event_reaches_every_hook_in_order(event):
    assert {name for name in vars(Hook) if name.startswith("on_")} == set(EVENTS)
    calls = []
    hooks = HookList([make_recorder("first", calls), make_recorder("second", calls)])
    getattr(hooks, event)("session", *EVENTS[event])
    expected = ("session", *EVENTS[event])
    assert calls == [("first", event, expected), ("second", event, expected)]


def test_a_hook_that_fails_at_the_end_keeps_no_other_from_closing():
    class Failing(Hook):
        def on_end(self, session):
            raise KeyError("defect")

    calls = []
    hooks = HookList([make_recorder("first", calls), Failing(), make_recorder("last", calls)])
    with pytest.raises(KeyError):
        hooks.on_end("session")
    assert [name for name, *_ in calls] == ["first", "last"]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Working directory with modules that Python has not seen."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    package = tmp_path / "cpt_user_package"
    package.mkdir()
    (package / "hooks.py").write_text(
        "from megatron_cpt import Hook\nclass EvalHook(Hook):\n    pass\nclass NoHook:\n    pass\n"
    )
    (package / "wrong.py").write_text("def :\n")
    (package / "exits.py").write_text("import sys\nsys.exit()\n")
    (package / "raises.py").write_text(
        "from megatron_cpt import Hook\nclass Greedy(Hook):\n    def __init__(self, model):\n        pass\n"
        "class Failing(Hook):\n    def __init__(self):\n        raise SystemExit(7)\n"
    )
    yield tmp_path
    for name in [name for name in sys.modules if name.startswith("cpt_user_package")]:
        del sys.modules[name]


def test_a_module_of_the_working_directory_is_imported(folder):
    hook = load_hook("cpt_user_package.hooks:EvalHook")
    assert type(hook).__name__ == "EvalHook"
    assert isinstance(hook, Hook)


@pytest.mark.parametrize(
    ("entry", "reason"),
    [
        ("cpt_user_package.missing:EvalHook", "cannot be imported"),
        ("cpt_user_package.wrong:EvalHook", "SyntaxError"),
        ("cpt_user_package.exits:EvalHook", "cannot be imported .SystemExit"),
        ("cpt_user_package.raises:Greedy", "failed .TypeError.*created without arguments"),
        ("cpt_user_package.raises:Failing", "failed .SystemExit: 7"),
        ("cpt_user_package.hooks:Missing", "has no class of that name"),
        ("cpt_user_package.hooks:NoHook", "is not a Hook"),
        ("cpt_user_package.hooks:Hook2", "has no class"),
    ],
)
def test_a_wrong_entry_is_named(folder, entry, reason):
    with pytest.raises(UserError, match=rf"log\.hooks: {entry}: .*{reason}"):
        load_hook(entry)


@pytest.mark.parametrize(
    "entry", ["my_hooks", "my_hooks:", ":Hook", "my-hooks:Hook", "a.b:c.d", "a:b:c", "a/b.py:Hook"]
)
def test_the_form_of_an_entry_is_checked(run_data, entry):
    run_data["log"] = {"hooks": ["package.module:Fine", entry]}
    (problem,) = draft_config(run_data).problems
    assert problem.startswith(f'log.hooks[1]: "{entry}": not of the form "module:Class"')


def test_entries_that_are_no_text_are_one_problem(run_data):
    run_data["log"] = {"hooks": [3]}
    (problem,) = draft_config(run_data).problems
    assert problem.startswith("log.hooks[0]: 3: not text")
    run_data["log"] = {"hooks": "a:B"}
    (problem,) = draft_config(run_data).problems
    assert problem.startswith('log.hooks: "a:B": not a list')
