"""Report files: escaping, size, the same bytes twice; and broken runs, which still give a page."""

from __future__ import annotations

import base64
import hashlib
import re
from html.parser import HTMLParser
from pathlib import Path

import orjson
import pytest
import yaml

import megatron_cpt as cpt
from megatron_cpt.cli import main
from megatron_cpt.errors import UserError
from megatron_cpt.report.build_page import build_page
from megatron_cpt.report.html_page import UPLOT_VERSION
from megatron_cpt.report.markdown_page import markdown_page
from megatron_cpt.report.run_record import RunReader
from megatron_cpt.report.svg import nice_ticks
from tests.helpers.report_runs import anomaly, config, training_line, validation_line, write_lines, write_run

ASSETS = Path(cpt.__file__).parent / "report" / "assets"
EVIL = "</script><script>alert(1)</script><img src=x onerror=alert(2)>\"'&"


class Outline(HTMLParser):
    """Tags and attributes of a page, and the content of its scripts."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes, self.scripts = [], [], []
        self._is_script = False
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += [(tag, name, value) for name, value in attributes]
        self._is_script = tag == "script"
        if self._is_script:
            self.scripts.append((dict(attributes).get("type"), ""))

    def handle_endtag(self, tag):
        self._is_script = False

    def handle_data(self, data):
        if self._is_script:
            kind, text = self.scripts[-1]
            self.scripts[-1] = (kind, text + data)


def report(folder, *compare):
    return cpt.write_report(folder, compare=compare, output=folder / "page.html").read_text()


def embedded(page):
    (data,) = [text for kind, text in Outline(page).scripts if kind == "application/json"]
    return orjson.loads(data)


def test_the_same_run_gives_the_same_bytes(tmp_path):
    first, second = (write_run(tmp_path / name, name="run") for name in ("a", "b"))
    assert report(first) == report(first)
    assert report(first).replace(str(first), "") == report(second).replace(str(second), "")


def test_numbers_are_embedded(tmp_path):
    data = embedded(report(write_run(tmp_path / "run", name="recipe")))
    (run,) = data["runs"]
    assert run["held_out"] == {"steps": [0, 150, 200], "loss": {
        "web": [4.0, 3.925, 3.9], "code": [3.0, 3.0375, 3.05], "qa": [5.0, 4.775, 4.7]
    }}  # fmt: skip
    assert (run["restarts"], run["bad_steps"], run["checkpoint_fallbacks"]) == (1, [90, 91], ["step-00000120"])
    assert data["charts"]["loss"]["curves"][0]["values"][:2] == [4.9, 4.8]


def test_the_page_loads_nothing_and_runs_only_its_own_scripts(tmp_path):
    page = report(write_run(tmp_path / "run"))
    outline = Outline(page)
    assert not {"link", "iframe", "img", "object", "form", "base"} & set(outline.tags)
    assert [a for a in outline.attributes if a[1] in ("src", "style", "href") and not str(a[2]).startswith("#")] == []
    assert [a for a in outline.attributes if a[1].startswith("on")] == []
    (policy,) = [value for tag, name, value in outline.attributes if tag == "meta" and "default-src" in str(value)]
    scripts = [text for kind, text in outline.scripts if kind is None]
    hashes = [base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in scripts]
    assert policy.startswith("default-src 'none'; style-src 'sha256-")
    assert all(f"'sha256-{one}'" in policy for one in hashes)
    assert "unsafe" not in policy
    assert "connect-src" not in policy


def test_tables_and_charts_can_be_read_without_eyes_and_without_scripts(tmp_path):
    page = report(write_run(tmp_path / "run"))
    outline = Outline(page)
    assert {value for tag, name, value in outline.attributes if tag == "th" and name == "scope"} == {"col", "row"}
    assert outline.tags.count("caption") == outline.tags.count("table") > 5
    labels = [value for tag, name, value in outline.attributes if tag == "svg" and name == "aria-label"]
    assert "Training loss (nats per token). small: from 4.9 to 3." in labels
    assert outline.tags.count("figcaption") == outline.tags.count("figure") == len(labels)


def test_names_are_text_and_never_markup(tmp_path):
    folder = write_run(tmp_path / "run", name=EVIL)
    source = f"web{EVIL}\x00\x1b[31m"
    lines = [
        validation_line(0, **{source: 4.0}),
        training_line(10, phase=EVIL, loss_by_source={source: 3.0}, samples_by_source={source: 4}),
        validation_line(200, **{source: 3.0}),
        {"step": 200, "evaluation": {EVIL: {EVIL: 0.5}}},
    ]
    write_lines(folder / "metrics.jsonl", lines)
    bad = {"source": EVIL, "prefix": EVIL, "documents": [EVIL], "epoch": EVIL}
    write_lines(folder / "anomalies.jsonl", [anomaly(10, kind=EVIL, samples=[bad], loss_by_source={EVIL: 2.0})])
    (folder / "run.yaml").write_text(yaml.safe_dump(config(name=EVIL, tokenizer=EVIL), allow_unicode=True))
    page = report(folder)
    outline = Outline(page)
    assert [kind for kind, _ in outline.scripts] == ["application/json", None, None]
    assert "img" not in outline.tags
    assert "<script>alert" not in page
    assert "\x1b" not in page
    assert "\x00" not in page
    assert any(EVIL in name for name in embedded(page)["runs"][0]["held_out"]["loss"])
    text = markdown_page(build_page([RunReader(folder).read()]))
    assert "<script" not in text
    assert "<img" not in text


def test_a_run_file_with_half_a_surrogate_pair_is_named_and_skipped(tmp_path):
    folder = write_run(tmp_path / "run")
    (folder / "run.yaml").write_text('name: "a\\ud800b"\n')
    page = report(folder)
    assert "run.yaml: skipped" in page


def broken(folder, change):
    write_run(folder)
    change(folder)
    page = report(folder)
    return page, embedded(page)["runs"][0]["notes"]


@pytest.mark.parametrize(
    ("change", "note"),
    [
        (lambda run: (run / "run.yaml").unlink(), "run.yaml: missing, so the configuration is unknown"),
        (lambda run: (run / "run.yaml").write_text("a: [1"), "run.yaml: skipped: "),
        (lambda run: (run / "plan.json").unlink(), "plan.json: missing, so nothing can be compared with the plan"),
        (lambda run: (run / "plan.json").write_text('{"steps": 20'), "plan.json: damaged, skipped"),
        (lambda run: (run / "plan.json").write_text("[]"), "plan.json: damaged, skipped (not an object)"),
        (
            lambda run: (run / "plan.json").write_text('{"phases": [{"name": "a", "first_step": "x"}]}'),
            "plan.json: its phases are damaged and skipped",
        ),
        (lambda run: (run / "metrics.jsonl").unlink(), "metrics.jsonl: missing, so nothing of what happened"),
        (lambda run: (run / "metrics.jsonl").write_bytes(b""), "no held-out losses: the run has no `validation`"),
        (lambda run: _cut(run / "metrics.jsonl"), "metrics.jsonl: the last line is cut off and skipped"),
        (
            lambda run: _append(run / "metrics.jsonl", b"x\ny\n"),
            "metrics.jsonl: 2 lines are no metrics and skipped, the",
        ),
        (lambda run: _append(run / "anomalies.jsonl", b'{"st'), "anomalies.jsonl: 1 damaged lines skipped"),
        (lambda run: _append(run / "events.jsonl", b"[]\n"), "events.jsonl: 1 damaged lines skipped"),
        (lambda run: (run / "plans.jsonl").write_bytes(b"\xff\n"), "plans.jsonl: 1 damaged lines skipped"),
        (
            lambda run: (run / "results.json").write_text('{"results": {"quiz": {"acc"'),
            "results.json: missing or damaged, skipped",
        ),
        (lambda run: (run / "results.json").write_text('{"results": 3}'), "results.json: no results in it, skipped"),
        (
            lambda run: next(run.glob("checkpoints/*/state.json")).write_text("{"),
            "checkpoint step-00000200: its text files are missing or damaged",
        ),
    ],
)
def test_a_broken_file_is_named_and_the_rest_is_reported(tmp_path, change, note):
    page, notes = broken(tmp_path / "run", change)
    assert [found for found in notes if found.startswith(note)], notes
    assert "Notes on files and tasks" in page


def _cut(path):
    path.write_bytes(path.read_bytes()[:-30])


def _append(path, content):
    with open(path, "ab") as file:
        file.write(content)


def test_a_run_with_nan_losses_and_without_validation_is_reported(tmp_path):
    folder = write_run(tmp_path / "run")
    lines = [training_line(10, loss=None, loss_by_source={"web": None}), training_line(20, loss=None)]
    write_lines(folder / "metrics.jsonl", lines)
    page = report(folder)
    assert embedded(page)["charts"]["loss"]["curves"][0]["values"] == [None, None]
    assert "no finite value" in page
    assert "Learning and forgetting are unknown" in page


@pytest.mark.parametrize("name", ["run.yaml", "plan.json", "metrics.jsonl"])
def test_one_file_of_a_run_is_enough(tmp_path, name):
    write_run(tmp_path / "whole")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / name).write_bytes((tmp_path / "whole" / name).read_bytes())
    assert "Summary" in report(tmp_path / "run")


@pytest.mark.parametrize("value", [None, 3, "x", [1], {"a": 1}, True, 1e300, -1])
def test_a_plan_state_and_events_of_odd_values_are_reported(tmp_path, value):
    folder = write_run(tmp_path / "run")
    plan = orjson.loads((folder / "plan.json").read_bytes())
    (folder / "plan.json").write_bytes(orjson.dumps({**dict.fromkeys(plan, value), "phases": value}))
    (next(folder.glob("checkpoints/*/state.json"))).write_bytes(
        orjson.dumps(dict.fromkeys(("layout", "versions"), value))
    )
    write_lines(
        folder / "events.jsonl",
        [
            dict.fromkeys(("event", "time", "step", "ranks"), value),
            {"event": "start", "time": value, "skipped_checkpoints": value, "versions": value},
        ],
    )
    write_lines(
        folder / "anomalies.jsonl", [anomaly(10, value=value, samples=value, loss_by_source=value), {"step": value}]
    )
    write_lines(folder / "plans.jsonl", [dict.fromkeys(("after_step", "run", "data_fingerprints"), value)] * 2)
    (folder / "run.yaml").write_text(yaml.safe_dump(dict.fromkeys(config(), value)))
    assert "Summary" in report(folder)


def test_a_report_of_a_hundred_thousand_lines_is_small_and_keeps_the_spike(tmp_path):
    folder = write_run(tmp_path / "run")
    line = orjson.dumps(training_line(160))
    spike = line.replace(b'"loss":3.4,', b'"loss":33.5,')
    assert spike != line
    with open(folder / "metrics.jsonl", "wb") as file:
        for step in range(1, 100_001):
            file.write((spike if step == 61_803 else line).replace(b'"step":160', b'"step":%d' % step, 1) + b"\n")
    page = report(folder)
    assert len(page) < 400_000
    assert page == report(folder)
    values = embedded(page)["charts"]["loss"]["curves"][0]["values"]
    assert len(values) <= 1000
    assert max(values) == 33.5


def test_the_vendored_library_is_unchanged_and_named_with_its_license():
    script = (ASSETS / "uplot.min.js").read_text()
    assert script.startswith(f"/*! https://github.com/leeoniya/uPlot (v{UPLOT_VERSION}) */")
    assert hashlib.sha256(script.encode()).hexdigest() == (
        "19c8d4c6ad88929a79f4ae49d6f7161566dfd0ba3d15cc495e974f787eb78f1f"
    )
    assert "MIT License" in (ASSETS / "uplot.LICENSE").read_text()
    for asset in ASSETS.iterdir():
        assert "</script" not in asset.read_text().lower(), asset


def test_colors_have_enough_contrast():
    """WCAG 2.1 AA: 4.5 for text, 3 for the lines of charts, in both color schemes."""
    style = (ASSETS / "report.css").read_text()
    light, dark = (dict(re.findall(r"--(\w+): (#\w{6})", part)) for part in style.split("@media screen")[:2])
    for colors in (light, dark):
        for name in ("ink", "faint", "accent", "flag"):
            assert min(contrast(colors[name], colors[ground]) for ground in ("paper", "card")) >= 4.5, name
        for place in range(6):
            assert contrast(colors[f"c{place}"], colors["paper"]) >= 3, place


def contrast(one, other):
    def luminance(color):
        parts = [int(color[at : at + 2], 16) / 255 for at in (1, 3, 5)]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize(
    ("low", "high", "ticks"),
    [
        (0.13, 0.88, [0.2, 0.4, 0.6, 0.8]),
        (0, 200, [0, 50, 100, 150, 200]),
        (5, 5, [5]),
        (-1e-9, 1e-9, [-1e-9, -5e-10, 0, 5e-10, 1e-9]),
    ],
)
def test_ticks_are_round_numbers(low, high, ticks):
    assert nice_ticks(low, high) == pytest.approx(ticks, rel=1e-12, abs=1e-20)


def test_a_folder_that_is_no_run_is_the_users_mistake(tmp_path, capsys):
    (tmp_path / "results.json").write_text("{}")
    assert main(["report", str(tmp_path)]) == 2
    assert (
        f"{tmp_path}: not a run directory: it has none of run.yaml, plan.json, metrics.jsonl" in capsys.readouterr().err
    )
    assert main(["report", str(tmp_path / "none")]) == 2
    assert "no such run directory" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["results.json"]
    with pytest.raises(UserError):
        cpt.write_report(tmp_path)


def test_the_command_writes_html_or_prints_markdown(tmp_path, capsys):
    one, two = (write_run(tmp_path / name, name=name) for name in ("one", "two"))
    assert main(["report", str(one)]) == 0
    assert capsys.readouterr().out == f"{one}/report.html\n"
    page = tmp_path / "page.html"
    assert main(["report", str(one), "--compare", str(two), str(two), "--output", str(page)]) == 0
    assert "compared with two" in page.read_text()
    assert capsys.readouterr().out == f"{page}\n"
    assert main(["report", str(one), "--markdown"]) == 0
    text = capsys.readouterr().out
    assert "| web | 4.0000 | 3.9250 | 3.9000 | −0.1000 | −2.5 % | learned |\n" in text
    assert main(["report", str(one), "--markdown", "--output", str(tmp_path / "page.md")]) == 0
    assert (tmp_path / "page.md").read_text() == text
    assert main(["report", str(one), "--output", str(tmp_path)]) == 2
    assert main(["report", str(one), "--output", str(tmp_path / "none" / "page.html")]) == 2
    assert main(["report", str(one), "--markdown", "--output", str(tmp_path / "none" / "page.md")]) == 2
    assert main(["report", str(one), "--serve", "--markdown"]) == 2
