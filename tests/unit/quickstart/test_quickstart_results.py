"""Tables and picture from metrics files written here."""

import io

import orjson
import pytest
import results
from matplotlib.figure import Figure
from rich.console import Console

from megatron_cpt.errors import RefusedError

DOMAINS = {"general text": ["c4", "wiki"], "questions": ["boolq"]}
BEFORE = {"c4": 5.0, "wiki": 4.0, "boolq": 6.0}


def write_run(folder, *, num_steps=20, switch=None, log_every=1, before=BEFORE, after=(4.5, 3.5, 5.0), extra=()):
    lines = [{"step": 0, "validation": before}]
    for step in range(log_every, num_steps + 1, log_every):
        phase = "qa" if switch and step > switch else "general"
        line = {"step": step, "tokens": 4096 * step, "lr": 1e-3 / step, "loss": 5 - step / 10, "phase": phase}
        lines.append({**line, "samples_by_source": {"web": 10 * step, **({"boolq": step} if phase == "qa" else {})}})
    lines.append({"step": num_steps, "validation": dict(zip(BEFORE, after, strict=True))})
    folder.mkdir()
    content = b"\n".join(map(orjson.dumps, [*lines, *extra])) + b"\n"
    (folder / "metrics.jsonl").write_bytes(content)
    write_plan(folder, general=switch or num_steps, **({"qa": num_steps} if switch else {}))
    return results.read_metrics(folder)


def write_plan(folder, **last_steps):
    plan = {"phases": [{"name": name, "last_step": step} for name, step in last_steps.items()]}
    (folder / "plan.json").write_bytes(orjson.dumps(plan))


def text_of(table):
    console = Console(file=io.StringIO(), width=120)
    console.print(table)
    return console.file.getvalue()


@pytest.fixture
def runs(tmp_path):
    return (
        write_run(tmp_path / "base"),
        write_run(tmp_path / "baseline"),
        write_run(tmp_path / "recipe", switch=15, after=(4.25, 3.75, 4.0)),
    )


def test_losses_before_and_after(runs):
    assert runs[2].before == BEFORE
    assert runs[2].after == {"c4": 4.25, "wiki": 3.75, "boolq": 4.0}


def test_rows_and_means(runs):
    rows = results.loss_rows(runs[1], runs[2], DOMAINS)
    assert rows == [
        {"domain": "c4", "before": 5.0, "baseline": 4.5, "recipe": 4.25, "mean": False},
        {"domain": "wiki", "before": 4.0, "baseline": 3.5, "recipe": 3.75, "mean": False},
        {"domain": "mean of general text", "before": 4.5, "baseline": 4.0, "recipe": 4.0, "mean": True},
        {"domain": "boolq", "before": 6.0, "baseline": 5.0, "recipe": 4.0, "mean": False},
        {"domain": "mean of questions", "before": 6.0, "baseline": 5.0, "recipe": 4.0, "mean": True},
    ]


def test_the_table_shows_worse_as_worse(runs):
    shown = {
        line.split("│")[1].strip(): line
        for line in text_of(results.loss_table(results.loss_rows(runs[1], runs[2], DOMAINS))).splitlines()
        if line.startswith("│")
    }
    assert "+0.250" in shown["wiki"]
    assert "-0.250" in shown["c4"]


def test_runs_from_different_weights_are_not_compared(tmp_path, runs):
    other = write_run(tmp_path / "other", before={**BEFORE, "wiki": 4.1})
    with pytest.raises(RefusedError, match="different held-out losses \\(wiki\\)"):
        results.loss_rows(runs[1], other, DOMAINS)


def test_tokens_read_by_source(runs):
    shown = text_of(results.reading_table(runs[1:], seq_length=256))
    assert f"{10 * 20 * 256:,}" in shown
    assert f"{20 * 256:,}" in shown


def test_a_step_done_again_after_a_resume_counts_once(tmp_path):
    again = {"step": 20, "tokens": 4096 * 20, "lr": 1e-3, "loss": 9.0, "phase": "general", "samples_by_source": {}}
    run = write_run(tmp_path / "resumed", extra=[again])
    assert len(run.steps) == 20
    assert run.steps[-1]["loss"] == 9.0


def test_a_run_cut_short_is_named(tmp_path):
    folder = tmp_path / "short"
    folder.mkdir()
    (folder / "metrics.jsonl").write_bytes(orjson.dumps({"step": 1, "loss": 5.0}) + b"\n")
    write_plan(folder, general=20)
    with pytest.raises(RefusedError, match="run short: no validation at step"):
        results.read_metrics(folder).after  # noqa: B018


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "metrics.jsonl: missing"),
        (b"", "has no training step"),
        (b'{"step": 1, "loss": 2}\n{"st', "line 2 is not JSON"),
    ],
)
def test_broken_files_are_refused(tmp_path, content, message):
    if content is not None:
        (tmp_path / "metrics.jsonl").write_bytes(content)
    write_plan(tmp_path, general=20)
    with pytest.raises(RefusedError, match=message):
        results.read_metrics(tmp_path)


def test_picture(tmp_path, runs):
    path = tmp_path / "picture.png"
    results.draw(*runs, results.loss_rows(runs[1], runs[2], DOMAINS), path)
    header = path.read_bytes()[:24]
    assert header[:8] == b"\x89PNG\r\n\x1a\n"
    assert int.from_bytes(header[16:20]) > 1000


def test_the_switch_is_drawn_to_the_step_after_the_base_model(tmp_path):
    recipe = write_run(tmp_path / "sparse", switch=13, log_every=10)
    axes = Figure().subplots()
    results.shade_phases(axes, recipe, offset=1e6)
    assert [text.get_text() for text in axes.texts] == ["general", "qa"]
    assert [line.get_xdata()[0] for line in axes.lines] == [pytest.approx((1e6 + 13 * 4096) / 1e6)]


def test_bars_are_changes_since_the_base_model(runs):
    axes = Figure().subplots()
    rows = [row for row in results.loss_rows(runs[1], runs[2], DOMAINS) if not row["mean"]]
    results.draw_changes(axes, rows)
    heights = [[bar.get_height() for bar in group] for group in axes.containers]
    assert heights == [[-0.5, -0.5, -1.0], [-0.75, -0.25, -2.0]]
