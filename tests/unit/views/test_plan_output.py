"""Tables and plots of plans."""

from __future__ import annotations

import io

import pytest

from megatron_cpt.config import draft_config
from megatron_cpt.errors import UserError
from megatron_cpt.planning import build_plan
from megatron_cpt.views import plan_table
from megatron_cpt.views.plan_plot import plot_plan
from megatron_cpt.views.plan_table import render_plan

SIZES = {"web": 1_000_000, "code": 500_000, "qa": 300}


def plan(data, *overrides):
    draft = draft_config(data, ["sources.qa.max_epochs=", *overrides])
    assert draft.problems == []
    return build_plan(draft.config, SIZES)


def rendered(found) -> str:
    stream = io.StringIO()
    render_plan(found, stream)
    return stream.getvalue()


def test_text_for_a_file_is_plain(run_data):
    text = rendered(plan(run_data))
    assert "\x1b" not in text
    assert all(line == line.rstrip() for line in text.splitlines())
    assert all(len(line) <= 120 for line in text.splitlines())


def test_the_tables_show_the_plan(run_data):
    lines = [line.split() for line in rendered(plan(run_data)).splitlines()]
    assert ["general", "1", "72", "72", "36.86K", "72.00%", "0.001", "0.0002016"] in lines
    assert ["general", "web", "0.6000", "346", "22.14K", "0.022"] in lines
    assert ["qa", "0.1000", "22", "1.408K", "5.500"] in lines
    assert ["whole", "run", "web", "0.5725", "458", "29.31K", "of", "1M", "0.029"] in lines


def test_a_long_list_of_sources_is_cut_and_says_so(run_data, monkeypatch):
    monkeypatch.setattr(plan_table, "_MOST_SOURCES", 2)
    text = rendered(plan(run_data))
    assert text.count("and 1 more: --json lists all of them") == 2  # in the second phase, and in the whole run


def test_warnings_are_printed(run_data):
    assert "warning: read more than 4 times: qa (5.50 times)" in rendered(plan(run_data))


@pytest.mark.parametrize(
    ("overrides", "text"),
    [
        ([], "cosine 0.001 -> 1e-05, no warmup"),
        (["schedule.warmup=7"], "cosine 0.001 -> 1e-05, warmup of 7 steps"),
        (["schedule.shape=wsd"], "wsd 0.001 -> 1e-05, linear decay over the last 20 steps, no warmup"),
        (["schedule.shape=constant", "phases.general.until={step: 3}"], "constant 0.001, no warmup"),
    ],
)
def test_schedules_in_words(run_data, overrides, text):
    assert text in rendered(plan(run_data, *overrides))


def test_names_are_no_markup(run_data):
    run_data["name"] = "[bold]run[/bold]"
    run_data["phases"][0]["name"] = "[red]general"
    text = rendered(plan(run_data))
    assert "[bold]run[/bold]" in text
    assert "[red]general" in text


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["schedule={shape: wsd, max_lr: 1, warmup: 10}", "phases.general.until={tokens: 30K}"],
        ["tokens=512", "phases=[{name: only, blend: {web: 1}}]"],
        ["name='$x_1$'", "phases.general.name='$y'"],
    ],
)
def test_pictures(run_data, tmp_path, overrides):
    path = tmp_path / "plan.png"
    plot_plan(plan(run_data, *overrides), path)
    assert path.read_bytes().startswith(b"\x89PNG")


def test_a_picture_of_many_sources(run_data, tmp_path):
    names = [f"s{n}" for n in range(40)]
    run_data["sources"] = {name: {"path": name} for name in names}
    run_data["phases"] = [{"name": "all", "blend": dict.fromkeys(names, 1.0)}]
    draft = draft_config(run_data)
    plot_plan(build_plan(draft.config, {}), tmp_path / "plan.svg")
    picture = (tmp_path / "plan.svg").read_text()
    assert "29 others" in picture  # 11 of 40 have their own color


def test_pictures_that_cannot_be_written(run_data, tmp_path):
    with pytest.raises(UserError, match=r"--plot .*missing/plan.png: cannot be written: No such file or directory"):
        plot_plan(plan(run_data), tmp_path / "missing" / "plan.png")
    with pytest.raises(UserError, match=r"--plot .*plan.xyz: .*not supported"):
        plot_plan(plan(run_data), tmp_path / "plan.xyz")


@pytest.mark.parametrize(
    ("section", "text"),
    [
        ("{tasks: [a]}", "evaluation  3 times: after steps 0, 72, 100"),
        ("{tasks: [a], every: 10}", "evaluation  12 times: after steps 0, 10, 20, 30, ... 100"),
        ("{tasks: [a], at: [end]}", "evaluation  after step 100"),
    ],
)
def test_the_summary_lists_evaluations(run_data, section, text):
    shown = rendered(plan(run_data, f"evaluation={section}", "tokenizer=byte"))
    assert text in "\n".join(
        " ".join(line.split(None, 1)).replace("evaluation ", "evaluation  ") for line in shown.splitlines()
    )
