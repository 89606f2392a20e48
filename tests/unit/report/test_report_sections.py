"""Sentences and tables of a report, by exact content on a small run."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil

import orjson
import pytest
import yaml

from megatron_cpt.checkpoint.layout import checkpoints_folder
from megatron_cpt.checkpoint.record import read_saved_run
from megatron_cpt.convert.importer import import_checkpoint
from megatron_cpt.report.build_page import build_page
from megatron_cpt.report.learning import TaskScore, held_out, stages, task_scores
from megatron_cpt.report.markdown_page import markdown_page
from megatron_cpt.report.operation import duration, time_spent
from megatron_cpt.report.page import CurveChart, DataTable
from megatron_cpt.report.run_record import RunReader
from tests.helpers.hf_models import save_hf_model
from tests.helpers.report_runs import anomaly, config, training_line, validation_line, write_lines, write_run


def page_of(*folders):
    return build_page([RunReader(folder).read() for folder in folders])


def tables(page):
    parts = (part for section in page.sections for part in section.parts)
    return {part.title: part for part in parts if isinstance(part, DataTable)}


def charts(page):
    parts = (part for section in page.sections for part in section.parts)
    return {part.key: part for part in parts if isinstance(part, CurveChart)}


@pytest.fixture
def recipe(tmp_path):
    return write_run(tmp_path / "recipe", name="recipe")


@pytest.fixture
def baseline(tmp_path):
    return write_run(tmp_path / "baseline", name="baseline", gain=0.1)


def test_the_summary_says_what_a_team_lead_must_know(recipe, baseline):
    assert page_of(recipe, baseline).summary == [
        "Finished: all 200 steps, 200K tokens.",
        "Learned: held-out loss fell on 2 of 3 sources, most on qa (−0.300); the mean changed by −0.117 nats per token "
        "since step 0.",
        "Forgot: held-out loss rose on 1 of 3 sources, most on code (+0.050).",
        "Tasks: 1 better, 1 better (error unknown), 1 within error of 3 metrics, step 0 to 200.",
        "Against baseline: lower held-out loss at the end on 2 of 3 sources, mean −0.089; 0 settings differ.",
        "Course: training loss 4.900 to 3.000, learning rate 0.000995 to 1.01e-05 over steps 10 to 200 (learning rate "
        "as planned at 20 lines); switch to phase qa after step 150, as planned.",
        "Speed: 500 tokens per second, MFU 40.0 %; 6 min 40 s in training steps of 10 min 20 s since the first start.",
        "Health: 1 restart, 2 bad steps, 0 skipped updates, 1 corrupt checkpoint.",
    ]


def test_learning_against_forgetting_comes_first_with_before_switch_and_end(recipe, baseline):
    page = page_of(recipe, baseline)
    assert page.sections[0].key == "learning"
    table = tables(page)["Held-out loss"]
    assert table.headers == [
        *("held-out source", "before (step 0)", "switch to qa (step 150)", "end (step 200)", "change", "in percent"),
        *("result", "baseline: end", "this run − that"),
    ]
    assert table.rows == [
        ["web", "4.0000", "3.9250", "3.9000", "−0.1000", "−2.5 %", "learned", "3.9667", "−0.0667"],
        ["code", "3.0000", "3.0375", "3.0500", "+0.0500", "+1.7 %", "forgot", "3.0500", "+0.0000"],
        ["qa", "5.0000", "4.7750", "4.7000", "−0.3000", "−6.0 %", "learned", "4.9000", "−0.2000"],
        ["mean", "4.0000", "3.9125", "3.8833", "−0.1167", "−2.9 %", "learned", "3.9722", "−0.0889"],
    ]
    assert tables(page)["Tasks"].rows[0][:2] == ["quiz", "bits_per_byte"], "bits per byte first"
    assert tables(page)["Tasks"].rows[0][6] == "better, error unknown"
    assert "treats both evaluations as independent" in tables(page)["Tasks"].note
    assert tables(page)["Tasks"].rows[1] == [
        *("quiz", "acc", "0.300 ± 0.020", "0.525 ± 0.020", "0.600 ± 0.020", "+0.300 ± 0.028", "better", "0.400 ± 0.020")
    ]
    assert tables(page)["Tasks"].rows[2][5:7] == ["−0.010 ± 0.042", "within error"]
    assert charts(page)["tasks-acc,none"].curves[0].errors == [0.02, 0.02, 0.02]


@pytest.mark.parametrize(
    ("change", "error", "verdict"),
    [
        *((0.0, None, "same"), (0.001, None, "better, error unknown"), (-0.001, None, "worse, error unknown")),
        *((0.0, 0.1, "same"), (0.1, 0.1, "within error"), (0.3, 0.1, "better"), (-0.3, 0.1, "worse")),
        (0.001, 0.0, "better"),
    ],
)
def test_a_change_without_a_known_error_is_not_certain(change, error, verdict):
    score = TaskScore("quiz", "acc", (0.5, 0.5 + change), (error, error), is_lower_better=False)
    assert score.verdict == verdict
    assert dataclasses.replace(score, values=(0.5, 0.5 - change), is_lower_better=True).verdict == verdict


def test_tasks_that_only_another_run_has_are_listed(recipe, baseline, tmp_path):
    line = {"step": 200, "evaluation": {"exam": {"acc,none": 0.75}, "quiz": {"f1,none": 0.5}}}
    with open(baseline / "metrics.jsonl", "ab") as file:
        file.write(orjson.dumps(line) + b"\n")
    page = page_of(recipe, baseline)
    rows = tables(page)["Tasks"].rows
    assert [row[:2] for row in rows[3:]] == [["exam", "acc"], ["quiz", "f1"]]
    assert rows[3][2:] == ["–", "–", "–", "–", "", "0.7500"]
    assert [curve.label for curve in charts(page)["tasks-acc,none"].curves] == ["quiz", "trivia"]
    bare = write_run(tmp_path / "bare", name="bare", with_tasks=False)
    assert ["exam", "acc", "–", "", "0.7500"] in tables(page_of(bare, baseline))["Tasks"].rows


def test_standard_errors_are_explained_only_beside_tasks(tmp_path, baseline):
    bare = write_run(tmp_path / "bare", name="bare", with_tasks=False)
    assert page_of(bare).sections[0].sentences == ["Held-out loss in nats per token: lower is better."]
    for runs in ((baseline,), (bare, baseline)):
        assert page_of(*runs).sections[0].sentences[0].endswith(" ± is one standard error.")


def test_a_task_says_which_direction_is_better(recipe):
    """A name such as `ter` does not tell: of translation errors, fewer are better."""
    evaluations = [{"ter": 40.0, "ter_stderr": 0.5}, {"ter": 30.0, "ter_stderr": 0.5}]
    for step, metrics in zip((0, 200), evaluations, strict=True):
        line = {"step": step, "evaluation": {"wmt": metrics}, "higher_is_better": {"wmt": {"ter": False}}}
        with open(recipe / "metrics.jsonl", "ab") as file:
            file.write(orjson.dumps(line) + b"\n")
    directions = {"flores": {"higher_is_better": {"ter": False}}}
    results = {"flores": {"ter,none": 50.0, "ter_stderr,none": 0.5}}
    for step, score in ((0, 50.0), (200, 60.0)):
        results["flores"]["ter,none"] = score
        content = {"results": results, "tasks": directions, "model": {"step": step}}
        (recipe / f"after-{step}.json").write_bytes(orjson.dumps(content))
    verdicts = {row[0]: row[6] for row in tables(page_of(recipe))["Tasks"].rows if row[1] == "ter"}
    assert verdicts == {"wmt": "better", "flores": "worse"}


def test_the_plan_is_compared_with_what_happened(recipe):
    assert tables(page_of(recipe))["Plan and reality"].rows == [
        ["steps", "200", "200", "none"],
        ["tokens", "200,000", "200,000", "none"],
        ["switch to qa", "after step 150", "between the lines of steps 150 and 160", "as planned"],
        ["steps of phase 1, general", "150", "150", "none"],
        ["steps of phase 2, qa", "50", "50", "none"],
        ["learning rate of step 200", "1.006e-05", "1.006e-05", "as planned at 20 lines"],
        ["peak memory of rank 0, GiB", "2.50", "3.00", "+0.50"],
    ]


def test_a_run_that_differs_from_its_plan_says_so(recipe):
    lines = [training_line(step, lr=5e-4, phase="general" if step < 130 else "qa") for step in (10, 120, 130)]
    write_lines(recipe / "metrics.jsonl", lines)
    page = page_of(recipe)
    rows = {row[0]: row[1:] for row in tables(page)["Plan and reality"].rows}
    assert rows["steps"] == ["200", "130", "−70"]
    assert rows["switch to qa"][-1] == "differs"
    assert rows["learning rate of step 130"][-1] == "up to 49.5 % of the maximum at 3 lines"
    assert page.summary[0] == "Not finished: 130 of 200 steps (65.0 %), 130K tokens."


def test_loss_and_rate_share_their_steps_and_mark_the_switch(recipe, baseline):
    found = charts(page_of(recipe, baseline))
    loss, lr = found["loss"], found["lr"]
    assert list(loss.steps) == list(lr.steps) == list(range(10, 201, 10))
    assert [curve.label for curve in loss.curves] == ["recipe", "baseline"]
    assert list(loss.curves[0].values)[:2] == [4.9, 4.8]
    assert loss.switches == ((150, "qa"),)
    assert loss.flags == [(90, "spike"), (91, "loss")]
    assert [curve.label for curve in found["loss-by-source"].curves] == ["web", "code", "qa"]


def test_tokens_and_epochs_are_counted_by_source(recipe):
    rows = tables(page_of(recipe))["Tokens read by source"].rows
    assert rows[0] == ["web", "80K", "80K", "47.1 %", "0.500", "0.500", "4.0", "4.900", "3.000"]
    assert rows[2] == ["qa", "10K", "10K", "5.9 %", "0.500", "0.500", "4.0", "3.600", "3.200"]


def test_the_time_adds_up(recipe):
    spent = time_spent(RunReader(recipe).read())
    assert (spent.steps, spent.data_wait, spent.sync_wait) == pytest.approx((400, 20, 50))
    assert (spent.pauses, spent.wall) == (25.0, 620.0)  # 20 lines of one second, and 5 after the last line
    rows = tables(page_of(recipe))["Time by activity"].rows
    assert [row[:3] for row in rows] == [
        ["training steps", "6 min 40 s", "64.5 %"],
        ["  of it: waiting for data", "20.0 s", "3.2 %"],
        ["  of it: waiting for device and other ranks", "50.0 s", "8.1 %"],
        ["validation, evaluation and saves", "25.0 s", "4.0 %"],
        ["start-up and time between processes", "3 min 15 s", "31.5 %"],
        ["from the first start to the last event", "10 min 20 s", "100.0 %"],
    ]


@pytest.mark.parametrize("startup", [{}, {"startup_seconds": None}])
def test_a_start_of_unknown_age_begins_with_its_event(recipe, startup):
    lines = [orjson.loads(line) for line in (recipe / "events.jsonl").read_bytes().splitlines()]
    for line in lines:
        line.pop("startup_seconds", None)
        line |= startup
    write_lines(recipe / "events.jsonl", lines)
    assert time_spent(RunReader(recipe).read()).wall == 600.0


def test_a_run_on_a_cpu_is_not_compared_with_the_memory_of_a_gpu(recipe):
    start = {"event": "start", "time": 1.0, "step": 0, "ranks": 1, "device": "cpu"}
    write_lines(recipe / "events.jsonl", [start, start | {"ranks": 2}])
    found = tables(page_of(recipe))
    assert not any("memory" in row[0] for row in found["Plan and reality"].rows)
    details = [row[3] for row in found["Starts and stops"].rows if row[1] == "started"]
    assert details == ["random weights; 1 rank on cpu", "random weights; 2 ranks on cpu"]


def test_the_course_is_over_the_lines_with_a_loss(recipe):
    lines = [training_line(step, loss=None if step == 10 else 3.0) for step in (10, 20, 30)]
    for logged, steps in ((lines, " over steps 20 to 30 ("), (lines[:2], " at step 20 (")):
        write_lines(recipe / "metrics.jsonl", logged)
        assert steps in next(sentence for sentence in page_of(recipe).summary if sentence.startswith("Course"))


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        *((0.0, "0.0 s"), (59.94, "59.9 s"), (60, "1 min 0 s"), (3599.4, "59 min 59 s"), (3599.6, "1 h 0 min")),
        *((13_800, "3 h 50 min"), (86_399, "1 d 0 h"), (187_200, "2 d 4 h"), (float("nan"), "–"), (-1.0, "0.0 s")),
    ],
)
def test_durations_are_said_as_people_say_them(seconds, text):
    assert duration(seconds) == text


def test_restarts_fallbacks_and_documents_of_bad_steps_are_listed(recipe):
    page = page_of(recipe)
    health = next(section for section in page.sections if section.key == "health")
    assert health.sentences == [
        "1 restart. Skipped as corrupt: step-00000120.",
        "Bad steps: 1 x loss, 1 x spike. 0 updates skipped.",
        f"Text of a step's documents: megatron-cpt trace {recipe} --step 91",
    ]
    events = [row[1] for row in tables(page)["Starts and stops"].rows]
    assert events == ["started", "ended without a record", "resumed", "stopped"]
    assert tables(page)["Bad steps"].rows[0] == ["90", "spike", "9.5000", "6.0000", "applied", "code (15.000)"]
    assert tables(page)["Documents of the bad steps"].rows[0] == ["90", "code", "data/code", "1", "30, 31"]


def test_documents_that_could_not_be_traced_say_why(recipe):
    lost = {"samples": None, "samples_unknown": "source web: its files were replaced after the step"}
    write_lines(recipe / "anomalies.jsonl", [anomaly(90, **lost)])
    rows = tables(page_of(recipe))["Documents of the bad steps"].rows
    assert rows == [["90", "source web: its files were replaced after the step"]]


def test_a_run_without_events_does_not_claim_to_have_no_restarts(recipe):
    (recipe / "events.jsonl").unlink()
    page = page_of(recipe)
    assert page.summary[-1] == "Health: restarts unknown, 2 bad steps, 0 skipped updates, 0 corrupt checkpoints."
    again = training_line(50)
    with open(recipe / "metrics.jsonl", "ab") as file:
        file.write(orjson.dumps(again) + b"\n")
    health = next(section for section in page_of(recipe).sections if section.key == "health")
    assert health.sentences[0] == "Restarts: unknown; metrics.jsonl shows 1 at least."


def test_differences_of_the_configuration_are_listed(tmp_path, recipe, baseline):
    other = config(name="baseline", batch={"global": 20, "micro": 2}, seed=7)
    (baseline / "run.yaml").write_text(orjson.dumps(other).decode())
    rows = tables(page_of(recipe, baseline))["Differences between the runs"].rows
    assert rows == [["name", "recipe", "baseline"], ["batch.global", "10", "20"], ["seed", "not set", "7"]]
    plans = [{"after_step": 0, "run": config()}, {"after_step": 100, "run": config(seq_length=50)}]
    write_lines(recipe / "plans.jsonl", plans)
    assert tables(page_of(recipe))["Changes during the run"].rows == [["100", "seq_length", "100", "50"]]


def test_digests_of_equal_runs_are_shown_once(recipe, baseline):
    rows = tables(page_of(recipe, baseline))["Digests"].rows
    assert [row[:2] for row in rows] == [
        ["manifest of checkpoint step-00000200 (SHA-256)", "all"],
        *(["tokenizer", "all"], ["code", "all"], ["data of web", "all"]),
    ]
    assert rows[1][2] == "tokenizer-digest"


def test_two_runs_of_one_name_are_told_apart(tmp_path):
    folders = [write_run(tmp_path / name, name="same") for name in ("a", "b")]
    first, second = charts(page_of(*folders))["loss"].curves
    assert (first.label, second.label) == (f"same ({folders[0]})", f"same ({folders[1]})")
    again = charts(page_of(folders[0], folders[0]))["loss"].curves
    assert [curve.label for curve in again] == [f"same ({folders[0]}) [{place}]" for place in (1, 2)]


def test_runs_from_other_weights_are_named(recipe, baseline):
    lines = [validation_line(0, web=9.0), training_line(200), validation_line(200, web=3.0)]
    write_lines(baseline / "metrics.jsonl", lines)
    against = next(sentence for sentence in page_of(recipe, baseline).summary if sentence.startswith("Against"))
    assert against.endswith("The two began at different losses, so from different weights.")


def test_stages_are_what_was_measured(recipe):
    run = RunReader(recipe).read()
    assert [stage.header for stage in stages(run, {0, 60, 140, 200})] == [
        *("before (step 0)", "switch to qa (step 140)", "end (step 200)")
    ]
    assert [stage.header for stage in stages(run, {100, 150})] == ["first (step 100)", "now (step 150)"]
    assert [stage.header for stage in stages(run, {0})] == ["before (step 0)"]
    assert stages(run, {}) == []
    assert [row.verdict for row in held_out(run)[1]] == ["learned", "forgot", "learned"]


def test_results_of_evaluate_belong_to_the_step_of_their_checkpoint(recipe):
    (recipe / "evaluations").mkdir()
    results = {"results": {"exam": {"acc,none": 0.7, "acc_stderr,none": 0.01, "alias": "exam"}}}
    for name, model in {"base": {"step": None, "checkpoint": "step-00000000"}, "switch": {"step": 150}}.items():
        content = {**results, "model": {"path": "x", **model}}
        (recipe / "evaluations" / f"{name}.json").write_bytes(orjson.dumps(content))
    (recipe / "results.json").write_bytes(orjson.dumps(results))
    run = RunReader(recipe).read()
    exam = next(score for score in task_scores(run)[1] if score.task == "exam")
    assert (exam.values, exam.errors) == ((0.7, 0.7, 0.7), (0.01, 0.01, 0.01))
    assert "results.json: does not name its checkpoint, so it counts for the last step, 200" in run.notes


def test_results_of_another_model_are_no_results_of_the_run(recipe, tmp_path):
    """Before, the results of a base model counted for the step of the run that has the same number."""
    digests = {}
    for name, family in {"own": "llama", "base": "qwen3", "other": "mistral"}.items():
        save_hf_model(tmp_path / family, family)
        import_checkpoint(tmp_path / family, tmp_path / name)
        digests[name] = read_saved_run(tmp_path / name).weights_digest()
    shutil.rmtree(checkpoints_folder(recipe))
    checkpoints_folder(recipe).mkdir()
    (tmp_path / "own").rename(checkpoints_folder(recipe) / "step-00000200")
    config = yaml.safe_load((recipe / "run.yaml").read_text()) | {"init": {"from": str(tmp_path / "base")}}
    (recipe / "run.yaml").write_text(yaml.safe_dump(config))
    (recipe / "evaluations").mkdir()
    for value, (name, digest) in enumerate(digests.items(), 1):
        content = {"results": {"exam": {"acc": value}}, "model": {"step": 200}, "digests": {"checkpoint": digest}}
        (recipe / "evaluations" / f"{name}.json").write_bytes(orjson.dumps(content))
    run = RunReader(recipe).read()
    assert (run.evaluations[200]["exam"], run.evaluations[0]["exam"]) == ({"acc": 1.0}, {"acc": 2.0})
    assert "other.json: evaluates another model than step-00000200 of this run, skipped" in run.notes


def test_results_of_a_step_that_the_run_has_not_reached_are_skipped(recipe):
    """Before, they became the end of the run."""
    content = {"results": {"exam": {"acc": 1}}, "model": {"step": 5000}, "digests": {"checkpoint": "sha256:other"}}
    (recipe / "other.json").write_bytes(orjson.dumps(content))
    run = RunReader(recipe).read()
    assert 5000 not in run.evaluations
    assert run.notes == ("other.json: is of step 5,000, which this run has not reached, skipped",)


def test_results_of_an_unreadable_checkpoint_count_with_a_note(recipe):
    (recipe / "checkpoints" / "step-00000150").mkdir(parents=True)
    content = {"results": {"exam": {"acc": 1}}, "model": {"step": 150}, "digests": {"checkpoint": "sha256:other"}}
    (recipe / "other.json").write_bytes(orjson.dumps(content))
    run = RunReader(recipe).read()
    assert run.evaluations[150]["exam"] == {"acc": 1.0}
    assert "other.json: counts, but was not compared with step-00000150 of this run: " in run.notes[0]


def write_import_results(run, **digests):
    """Write results of `evaluate` for Hugging Face folders: their temporary imports are step 0."""
    (run / "evaluations").mkdir()
    for value, (name, digest) in enumerate(digests.items(), 1):
        model = {"step": None, "checkpoint": "step-00000000"}
        content = {"results": {"exam": {"acc": value}}, "model": model, "digests": {"checkpoint": digest}}
        (run / "evaluations" / f"{name}.json").write_bytes(orjson.dumps(content))


def set_origin(run, origin):
    settings = yaml.safe_load((run / "run.yaml").read_text()) | {"init": {"from": str(origin)}}
    (run / "run.yaml").write_text(yaml.safe_dump(settings))


def test_results_of_an_import_are_before_the_run_only_if_the_run_started_from_it(recipe, tmp_path):
    """Before, results of any Hugging Face folder counted as step 0."""
    save_hf_model(tmp_path / "hf", "llama")
    import_checkpoint(tmp_path / "hf", tmp_path / "base")
    import_checkpoint(tmp_path / "hf", tmp_path / "aside" / "step-00000000")  # as `evaluate` does it
    own = read_saved_run(tmp_path / "aside" / "step-00000000").weights_digest()
    set_origin(recipe, tmp_path / "base")
    write_import_results(recipe, own=own, other="sha256:other")
    content = orjson.loads((recipe / "evaluations" / "other.json").read_bytes())
    content["model"]["checkpoint"] = "my-import"
    (recipe / "evaluations" / "renamed.json").write_bytes(orjson.dumps(content))
    run = RunReader(recipe).read()
    assert {step: found["exam"] for step, found in run.evaluations.items() if "exam" in found} == {0: {"acc": 1.0}}
    assert [note.partition(",")[0] for note in run.notes] == [
        f"{name}: evaluates another model than {tmp_path}/base" for name in ("other.json", "renamed.json")
    ]
    assert "from which this run started, skipped; if it is the same model, imported with other" in run.notes[0]


def test_results_of_an_import_are_no_results_of_a_run_from_random_weights(recipe):
    write_import_results(recipe, other="sha256:other")
    run = RunReader(recipe).read()
    assert "exam" not in run.evaluations[0]
    assert run.notes == ("other.json: evaluates an imported model, but this run has no init.from, skipped",)


def test_results_of_an_import_count_when_the_origin_is_gone(recipe, tmp_path):
    set_origin(recipe, tmp_path / "gone")
    write_import_results(recipe, base="sha256:base")
    run = RunReader(recipe).read()
    assert run.evaluations[0]["exam"] == {"acc": 1.0}
    assert run.notes == (
        "base.json: counts as step 0, but was not compared with the checkpoint from which this run started: "
        f"{tmp_path}/gone: no such checkpoint or run directory; give the path of one",
    )
    (recipe / "run.yaml").unlink()
    assert RunReader(recipe).read().notes[1].endswith("this run started: run.yaml cannot be read")


def test_a_second_file_for_the_same_step_is_named(recipe):
    for name in ("a", "b"):
        content = {"results": {"exam": {"acc": 0.5}}, "model": {"step": 200}}
        (recipe / f"{name}.json").write_bytes(orjson.dumps(content))
    assert "b.json: exam of step 200 is also in a.json; b.json counts" in RunReader(recipe).read().notes


def write_measurement(run, name, step, *, digest=None, documents=8, num_fewshot=0):
    content = {
        "results": {"exam": {"acc": 0.5}, "group": {"acc": 0.5}},
        "model": {"step": step, "checkpoint": f"step-{step:08d}"},
        "tasks": {
            "exam": {"documents": documents, "num_fewshot": num_fewshot} | ({"digest": digest} if digest else {})
        },
    }
    (run / f"{name}.json").write_bytes(orjson.dumps(content))


def notes_of(page):
    return [note for note in page.notes if "documents" in note]


def test_scores_on_different_documents_are_named_once_per_task(recipe):
    for step, name in ((100, "middle"), (150, "switch"), (200, "end")):
        write_measurement(recipe, name, step, digest="sha256:1234567890", documents=4)
    write_measurement(recipe, "base", 0, digest="sha256:abcdef1234", documents=2, num_fewshot=2)
    page = page_of(recipe)
    assert notes_of(page) == [
        "exam: not measured on the same documents and prompts: base.json (2 documents, 2 few-shot examples); "
        "end.json and 2 more (4 documents, 0 few-shot examples)"
    ]
    assert page.sections[-1].sentences == page.notes
    note = "1 task was not measured on the same documents and prompts: see the notes at the end."
    assert note in tables(page)["Tasks"].note
    write_measurement(recipe, "base", 0, digest="sha256:abcdef1234", documents=4)
    assert notes_of(page_of(recipe))[0].endswith(
        ": base.json (4 documents, 0 few-shot examples, digest abcdef12); "
        "end.json and 2 more (4 documents, 0 few-shot examples, digest 12345678)"
    )
    write_measurement(recipe, "base", 0, digest="sha256:1234567890", documents=4)
    page = page_of(recipe)
    assert notes_of(page) == []
    assert "not measured" not in tables(page)["Tasks"].note


def test_without_digests_the_numbers_of_documents_are_compared(recipe):
    write_measurement(recipe, "base", 0, documents=8)
    write_measurement(recipe, "end", 200, documents=8, digest="sha256:12")
    assert notes_of(page_of(recipe)) == []
    write_measurement(recipe, "end", 200, documents=9, digest="sha256:12")
    assert len(notes_of(page_of(recipe))) == 1
    write_measurement(recipe, "end", 200, documents=8, num_fewshot=1)
    assert len(notes_of(page_of(recipe))) == 1
    write_measurement(recipe, "end", 200, documents="x", num_fewshot=None)
    assert notes_of(page_of(recipe)) == []


def test_evaluations_during_training_are_compared_with_files(recipe):
    """A run with `evaluation: {limit: 200}`, and `evaluate` without --limit at its end."""
    facts = {"exam": {"documents": 200, "num_fewshot": 5, "digest": "sha256:12"}}
    with (recipe / "metrics.jsonl").open("ab") as file:
        for step in (0, 200):
            line = {"step": step, "evaluation": {"exam": {"acc": 0.5}}, "tasks": facts, "evaluation_seconds": 1.0}
            file.write(orjson.dumps(line, option=orjson.OPT_APPEND_NEWLINE))
    assert notes_of(page_of(recipe)) == []
    write_measurement(recipe, "end", 200, documents=1838, num_fewshot=5, digest="sha256:34")
    assert notes_of(page_of(recipe)) == [
        "exam: not measured on the same documents and prompts: metrics.jsonl, step 0 (200 documents, 5 few-shot "
        "examples); end.json (1,838 documents, 5 few-shot examples)"
    ]


def test_scores_of_compared_runs_are_of_the_same_documents(recipe, baseline):
    write_measurement(recipe, "end", 200, digest="sha256:12")
    write_measurement(baseline, "first", 0, digest="sha256:34")
    write_measurement(baseline, "last", 200, digest="sha256:12")
    assert notes_of(page_of(recipe, baseline)) == [], "the table shows only the end of the other run"
    write_measurement(baseline, "last", 200, digest="sha256:34", documents=2)
    (note,) = notes_of(page_of(recipe, baseline))
    assert note.endswith(
        "end.json (8 documents, 0 few-shot examples); baseline: last.json (2 documents, 0 few-shot examples)"
    )


@pytest.mark.parametrize(
    "changes",
    [
        *({"lr": value} for value in (None, "high", math.nan)),
        *({"phase": value} for value in (["qa"], {"a": 1}, 7)),
        *({"skipped_updates": value} for value in (1e30, -1, "x")),
        *({"step_seconds": value} for value in (1e308, -1e308)),
    ],
)
def test_one_bad_value_in_every_line_still_gives_a_page(recipe, changes):
    lines = [orjson.loads(line) | changes for line in (recipe / "metrics.jsonl").read_bytes().splitlines()]
    (recipe / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    text = markdown_page(page_of(recipe))
    assert "nan" not in text.lower().replace("nano", "")
    if "lr" in changes:
        assert "learning rate" not in text.partition("Course:")[2].partition("\n")[0]


def test_the_moving_average_is_shown_beside_the_weights_and_is_no_source_of_its_own(recipe):
    lines = [orjson.loads(line) for line in (recipe / "metrics.jsonl").read_bytes().splitlines()]
    for line in lines:
        if "validation" in line:
            line["validation_ema"] = {name: loss - 0.25 for name, loss in line["validation"].items()}
    (recipe / "metrics.jsonl").write_bytes(b"".join(orjson.dumps(line) + b"\n" for line in lines))
    (recipe / "evaluations").mkdir()
    results = {"results": {"exam": {"acc,none": 0.875}}, "model": {"step": 200, "weights": "ema"}}
    (recipe / "evaluations" / "ema.json").write_bytes(orjson.dumps(results))
    run = RunReader(recipe).read()
    assert run.evaluations_ema == {200: {"exam": {"acc,none": 0.875}}}
    raw = held_out(run)[1]
    found = tables(page_of(recipe))
    table = found["Held-out loss of the moving average (EMA)"]
    assert [row[0] for row in table.rows] == [row.source for row in raw]
    assert {row[-1] for row in table.rows} == {"−0.2500"}
    assert [row[:3] for row in found["Tasks of the moving average (EMA)"].rows] == [["exam", "acc", "0.8750"]]
    assert all("exam" not in row[0] or "0.8750" not in row for row in found["Tasks"].rows)
