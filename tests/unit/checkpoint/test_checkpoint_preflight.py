"""Comparison of a run with its checkpoint: changes, refusals, and the table that shows them."""

from __future__ import annotations

from typing import Any

import pytest

from megatron_cpt.checkpoint.preflight import ALLOWABLE, find_changes, model_shape, refuse_unless_allowed
from megatron_cpt.cli.commands.runs.train_command import ALLOW_HELP
from megatron_cpt.config import RunConfig, draft_config
from megatron_cpt.errors import RefusedError
from megatron_cpt.views.preflight_table import ResumeSummary, describe

HERE = ResumeSummary(step=41, samples={"web": 200, "code": 120}, rate=4.0e-4, saved_rate=4.0e-4)
DATA = {"web": "a", "code": "b", "qa": "c"}


def _config(data: dict[str, Any], *changes: str) -> RunConfig:
    return draft_config(data, changes).finish("run.yaml")


def _changes(data: dict[str, Any], *changes: str, tokenizers: tuple[str | None, str | None] = (None, None)):
    return find_changes(_config(data).to_dict(), _config(data, *changes), DATA, DATA, tokenizers)


def test_nothing_changed_is_one_line_that_says_what_was_compared(run_data: dict[str, Any]) -> None:
    text = describe(_changes(run_data, "checkpoint.keep=3", "batch.micro=1", "log.every=1"), (), HERE)
    assert "\n" not in text
    assert text.startswith("preflight: nothing changed (")
    for name in ("model", "batch", "seed", "blend", "schedule", "tokenizer", "data"):
        assert name in text
    assert "samples: 320 already read, the next ones unchanged" in text
    assert "rate: 0.0004 at step 41; optimizer: moments and step continue" in text


def test_the_table_has_what_changed_what_is_the_same_and_what_follows(run_data: dict[str, Any]) -> None:
    changes = _changes(run_data, "schedule.max_lr=2e-3", "optimizer.betas=[0.9, 0.99]")
    text = describe(changes, ["schedule"], ResumeSummary(41, HERE.samples, 8.0e-4, 4.0e-4))
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in text.splitlines() if line.startswith("│")]
    by_name = {row[0]: row for row in rows}
    assert by_name["schedule"][1] == "allowed"
    assert by_name["optimizer"][1] == "refused"
    assert by_name["the rest"][1] == "same"
    assert text.splitlines()[-3:] == [
        "samples: 320 already read, the next ones unchanged",
        "rate: 0.0008 at step 41, 0.0004 without the changes",
        "optimizer: moments and step continue, with changes by optimizer",
    ]


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ("model.vocab=300", "vocab 257 -> 300"),
        ("model.norm=rmsnorm", "norm "),
        ("model.activation=gelu", "activation "),
        ("model.rotary_percent=1.0", "rotary_percent 0.5 -> 1.0"),
        ("model.rotary_base=500000", "rotary_base "),
    ],
)
def test_what_would_load_and_train_wrong_is_refused_for_good(run_data: dict[str, Any], change: str, name: str) -> None:
    changes = _changes(run_data, change)
    with pytest.raises(RefusedError, match=rf"model: .*{name}.*[\s\S]*model cannot change within a run"):
        refuse_unless_allowed(changes, [rule.rule.name for rule in changes], "step-00000040")


def test_a_tokenizer_is_compared_by_its_content(run_data: dict[str, Any]) -> None:
    moved = "tokenizer=sentencepiece:elsewhere/tokenizer.model"
    assert _changes(run_data, moved, tokenizers=("abc", "abc")) == []
    by_path = _changes(run_data, moved)
    assert [change.rule.name for change in by_path] == ["tokenizer"], "if a content is unknown, the path counts"
    (changed,) = _changes(run_data, tokenizers=("abc", "abd"))
    assert str(changed) == "tokenizer: content abc -> content abd: ids may mean other text from this step on"
    with pytest.raises(RefusedError, match="to resume anyway: --allow tokenizer"):
        refuse_unless_allowed([changed], (), "step-00000040")
    refuse_unless_allowed([changed], ["tokenizer"], "step-00000040")


def _teacher_changes(data: dict[str, Any], before: str, now: str, digests: tuple[str | None, str | None]) -> list[str]:
    saved, run = (_config(data, "init.from=start", f"teacher={teacher}") for teacher in (before, now))
    return [str(change) for change in find_changes(saved.to_dict(), run, DATA, DATA, teachers=digests)]


def test_a_teacher_is_compared_by_its_content(run_data: dict[str, Any]) -> None:
    assert _teacher_changes(run_data, "{from: init}", "{from: moved}", ("a", "a")) == []
    assert _teacher_changes(run_data, "{from: init}", "{from: start}", (None, None)) == []
    (other,) = _teacher_changes(run_data, "{from: init}", "{from: init}", ("a", "b"))
    assert other == "teacher: content a -> b: the loss has another target or weight from this step on"
    (weight,) = _teacher_changes(run_data, "{from: init}", "{from: init, weight: 0.1}", ("a", "a"))
    assert weight.startswith("teacher: weight 0.5 -> 0.1")
    (removed,) = _teacher_changes(run_data, "{from: init}", "null", ("a", None))
    assert removed.startswith("teacher: ")
    named = "{from: init, sources: {web: 1.0}}"
    assert _teacher_changes(run_data, "{from: init}", named, ("a", "a")) == [], "1 is the factor of a source not named"


def test_a_field_that_is_newer_than_the_checkpoint_has_not_changed(run_data: dict[str, Any]) -> None:
    now = _config(run_data)
    saved = now.to_dict()
    for section, field in (("model", "qk_norm"), ("precision", "fp8"), ("documents", "eod_loss"), ("batch", "ramp_up")):
        del saved[section][field]
    assert find_changes(saved, now, DATA, DATA) == []
    assert model_shape(saved) == model_shape(now.to_dict())


def test_a_field_that_is_not_known_any_more_is_told(run_data: dict[str, Any]) -> None:
    saved = _config(run_data).to_dict()
    saved["model"]["sliding_window"] = 4096
    (change,) = find_changes(saved, _config(run_data), DATA, DATA)
    assert "sliding_window 4096 -> None" in str(change)


def test_help_names_every_change_that_can_be_allowed() -> None:
    assert ALLOW_HELP.endswith(f"{', '.join(ALLOWABLE)}.")


class TestEndOfDocument:
    def _changes(self, data, ends, *changes, tokenizers=(None, None)):
        return find_changes(_config(data).to_dict(), _config(data, *changes), DATA, DATA, tokenizers, ends)

    @pytest.mark.parametrize("ends", [None, (7, 7), (None, None)])
    def test_unchanged_or_of_an_earlier_version(self, run_data, ends):
        assert self._changes(run_data, ends) == []

    def test_another_id_is_refused_unless_allowed(self, run_data):
        changes = self._changes(run_data, (501, 0))
        with pytest.raises(RefusedError, match=r"documents: end-of-document id 501 -> 0: .*\n.*--allow documents"):
            refuse_unless_allowed(changes, [], "here")
        refuse_unless_allowed(changes, ["documents"], "here")

    def test_a_part_of_the_tokenizer_that_causes_it(self, run_data):
        (change,) = self._changes(run_data, (501, 0), tokenizers=("a", "b"))
        assert change.rule.name == "tokenizer"
        assert change.what == "content a -> content b, end-of-document id 501 -> 0"


def test_fingerprints_of_an_earlier_version(run_data):
    now = {"web": "a+x+y", "code": "b+x+-", "qa": "c+x+y"}
    config = _config(run_data)
    assert find_changes(config.to_dict(), config, DATA, now) == []
    (change,) = find_changes(config.to_dict(), config, now, now | {"qa": "c+x+z", "code": "b+x+q"})
    assert change.what.startswith("the files of qa differ")
