"""Run directories of a fit: what is skipped with a note, and what is refused by name."""

from __future__ import annotations

import math

import orjson
import pytest
import yaml

from megatron_cpt.errors import ConfigError, UserError
from megatron_cpt.law.finished_runs import arms_of, read_finished_run, read_finished_runs
from tests.helpers.law_runs import law_config, qa_blend, small_configs, write_law_run


@pytest.fixture
def folders(tmp_path):
    return [write_law_run(tmp_path / f"run{n}", data, seed=n) for n, data in enumerate(small_configs()[:5])]


def change_yaml(folder, **changes):
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | changes))


def change_lines(folder, change):
    path = folder / "metrics.jsonl"
    lines = [orjson.loads(line) for line in path.read_bytes().splitlines()]
    path.write_bytes(b"".join(orjson.dumps(line) + b"\n" for line in change(lines)))


def test_runs_are_read_with_their_points(folders):
    runs = read_finished_runs(folders)
    assert [len(run.steps) for run in runs] == [10] * 5
    assert runs[0].start == {"general": 3.0, "exam": 5.0}
    assert runs[0].path.sources == ("web", "code")
    assert all(run.notes == () for run in runs)


def test_a_torn_last_line_and_losses_that_are_not_finite_are_skipped_with_a_note(folders):
    change_lines(folders[0], lambda lines: [*lines[:4], {**lines[4], "validation": {"general": None, "exam": 4.9}}])
    with open(folders[0] / "metrics.jsonl", "ab") as file:
        file.write(b'{"step": 40, "validat')
    run = read_finished_run(folders[0])
    assert len(run.steps) == 4
    assert run.notes == (
        "metrics.jsonl: the last line is cut off and skipped",
        "1 held-out losses are not between 1e-06 and 1e+06 and skipped",
    )


@pytest.mark.parametrize("loss", [5e-324, 1e308, 0, -1.0])
def test_a_loss_that_is_no_measurement_is_skipped_with_a_note(folders, loss):
    change_lines(folders[0], lambda lines: [*lines[:-1], {"step": 40, "validation": {"general": loss, "exam": 4.9}}])
    run = read_finished_run(folders[0])
    assert math.isnan(run.losses["general"][-1])
    assert run.notes == ("1 held-out losses are not between 1e-06 and 1e+06 and skipped",)


@pytest.mark.parametrize("step", [2**63, 2**53, -1, True])
def test_a_validation_line_without_a_valid_step_is_skipped_with_a_note(folders, step):
    change_lines(folders[0], lambda lines: [*lines, {"step": step, "validation": {"general": 3.0}}])
    run = read_finished_run(folders[0])
    assert len(run.steps) == 10
    assert run.notes == ("metrics.jsonl: 1 line is no metrics and skipped, the first is line 12",)


def test_a_run_that_was_repeated_counts_its_last_life(folders):
    line = {"step": 10, "tokens": 1, "phase": "p", "lr": 1.0, "loss": 1.0}
    change_lines(folders[0], lambda lines: [*lines, line, {"step": 12, "validation": {"general": 9.0, "exam": 9.0}}])
    run = read_finished_run(folders[0])
    assert run.losses["general"][list(run.steps).index(12)] == 9.0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda lines: [], "no held-out loss before the first step"),
        (lambda lines: lines[1:], "no held-out loss before the first step"),
        (lambda lines: [{**lines[0], "validation": {"general": None}}, *lines[1:]], "no usable held-out loss"),
        (lambda lines: [{**lines[0], "validation": {"general": 5e-324}}, *lines[1:]], "no usable held-out loss"),
        (
            lambda lines: [*lines, {"step": 1000, "validation": {"general": 3.0}}],
            r"run0/metrics\.jsonl: has held-out losses after step 1,000, but plan\.json ends with step 40",
        ),
        (lambda lines: lines[:3], "2 validations after the start, at least 3"),
    ],
)
def test_runs_without_enough_validations_are_refused(folders, change, message):
    change_lines(folders[0], change)
    with pytest.raises(UserError, match=message):
        read_finished_run(folders[0])


@pytest.mark.parametrize("name", ["run.yaml", "plan.json"])
def test_a_run_without_its_files_is_refused(folders, name):
    (folders[0] / name).write_text("{")
    with pytest.raises(UserError, match=r"run0: its run\.yaml or plan\.json is missing or damaged"):
        read_finished_run(folders[0])


@pytest.mark.parametrize("key", ["schedule", "phases", "steps"])
def test_a_damaged_plan_is_refused(folders, key):
    path = folders[0] / "plan.json"
    path.write_bytes(orjson.dumps(orjson.loads(path.read_bytes()) | {key: "x"}))
    with pytest.raises(UserError, match=r"run0/plan\.json: damaged"):
        read_finished_run(folders[0])


def test_a_run_that_changed_its_blend_is_refused(folders):
    lines = [{"after_step": step, "plan": {"phases": step}, "run": {}} for step in (0, 20)]
    (folders[0] / "plans.jsonl").write_bytes(b"\n".join(map(orjson.dumps, lines)))
    with pytest.raises(UserError, match="blend or schedule changed while it ran"):
        read_finished_run(folders[0])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": {"layers": 2}}, "run3: model is"),
        ({"tokenizer": "byte"}, "run3: tokenizer is 'byte', but"),
        ({"seq_length": 128}, "run3: seq_length is 128"),
        ({"batch": {"global": 16, "micro": 2}}, "run3: batch.global is 16"),
        ({"init": {"from": "other", "load": "weights"}}, "run3: init.from is 'other'"),
        ({"validation": {"every": 4, "batches": 20, "sources": {}}}, "run3: validation.sources is {}"),
        ({"sources": {"web": {"path": "other"}}}, "run3: sources.web.path is ['other']"),
    ],
)
def test_runs_of_another_model_tokenizer_or_trunk_are_refused_by_name(folders, changes, message):
    change_yaml(folders[3], **changes)
    with pytest.raises(ConfigError) as refused:
        read_finished_runs(folders)
    assert message in str(refused.value)


def test_runs_that_differ_in_seed_name_output_and_validation_are_one_arm(folders, tmp_path):
    data = small_configs()
    again = data[1] | {"seed": 7, "name": "again", "output": "runs/again"}
    again["validation"] = again["validation"] | {"every": 7}
    other = law_config(qa_blend(0.11))
    folders += [write_law_run(tmp_path / "again", again), write_law_run(tmp_path / "other", other)]
    change_lines(folders[5], lambda lines: lines[:7])
    runs = read_finished_runs(folders)
    assert arms_of(runs) == [[0], [1, 5], [2], [3], [4], [6]]
    with pytest.raises(UserError, match="4 runs of 3 arms to fit; give at least 4 arms"):
        read_finished_runs([*folders[:3], folders[5]])


@pytest.mark.parametrize("changes", [{"tokens": 40_960}, {"schedule": {"shape": "constant", "max_lr": 1e-3}}])
def test_another_length_or_schedule_is_another_arm(folders, tmp_path, changes):
    folders.append(write_law_run(tmp_path / "other", small_configs()[1] | changes))
    assert len(arms_of(read_finished_runs(folders))) == 6


def test_a_blend_in_other_units_and_order_is_the_same_arm(folders, tmp_path):
    same = law_config({"code": 30, "web": 70})
    folders.append(write_law_run(tmp_path / "same", same))
    assert arms_of(read_finished_runs(folders))[0] == [0, 5]


def test_a_trunk_and_its_newest_checkpoint_are_the_same_trunk(folders, tmp_path, monkeypatch):
    checkpoint = tmp_path / "runs" / "trunk" / "checkpoints" / "step-00000010"
    checkpoint.mkdir(parents=True)
    (checkpoint / "state.json").write_text('{"train": {"step": 10}}')
    monkeypatch.chdir(tmp_path)
    change_yaml(folders[3], init={"from": "runs/trunk/checkpoints/step-00000010", "load": "weights"})
    assert len(read_finished_runs(folders)) == 5
    change_yaml(folders[3], init={"from": "runs", "load": "weights"})  # a folder without a checkpoint
    with pytest.raises(ConfigError, match=r"run3: init\.from is 'runs'"):
        read_finished_runs(folders)


def test_runs_of_another_seed_and_a_slightly_different_start_belong_together(folders):
    change_lines(folders[2], lambda lines: [{"step": 0, "validation": {"general": 3.002, "exam": 5.0}}, *lines[1:]])
    change_yaml(folders[2], seed=7)
    assert len(read_finished_runs(folders)) == 5


@pytest.mark.parametrize("seed", [1234, 7])
def test_another_trunk_shows_in_the_loss_before_the_first_step(folders, seed):
    change_yaml(folders[2], seed=seed)
    change_lines(folders[2], lambda lines: [{"step": 0, "validation": {"general": 3.01, "exam": 5.0}}, *lines[1:]])
    with pytest.raises(ConfigError, match=r"the loss of general before the first step is 3\.0100"):
        read_finished_runs(folders)


def test_a_source_that_the_first_run_does_not_read_has_one_path(folders):
    sources = yaml.safe_load((folders[2] / "run.yaml").read_text())["sources"]
    change_yaml(folders[2], sources=sources | {"qa": {"path": "other"}})
    with pytest.raises(ConfigError, match=r"run2: sources\.qa\.path is \['other'\], but .*run1 has \['data/qa'\]"):
        read_finished_runs(folders)


@pytest.mark.parametrize("sources", ["web", [1], {"web": "x"}])
def test_damaged_sources_are_refused(folders, sources):
    change_yaml(folders[0], sources=sources)
    with pytest.raises(ConfigError, match="rename one of the sources"):
        read_finished_runs(folders)


def test_all_problems_are_in_one_message(folders, tmp_path):
    change_yaml(folders[3], tokenizer="byte")
    with pytest.raises(ConfigError) as refused:
        read_finished_runs([*folders, tmp_path / "none"])
    assert len(refused.value.problems) == 2


def test_too_few_arms_and_a_run_given_twice(folders):
    with pytest.raises(UserError, match="3 runs of 3 arms to fit; give at least 4 arms"):
        read_finished_runs(folders[:3])
    with pytest.raises(UserError, match="given twice"):
        read_finished_runs([*folders, folders[0]])
