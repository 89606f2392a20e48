"""`fit` and `plan --predict`, from run directories to tables, JSON and a picture."""

from __future__ import annotations

import json

import numpy as np
import pytest
import yaml

from megatron_cpt.cli import main
from megatron_cpt.law.fit_runs import fit_runs
from megatron_cpt.law.law_file import write_law
from tests.helpers.law_runs import (
    STEPS,
    general_blend,
    law_config,
    law_run,
    qa_blend,
    small_configs,
    write_law_run,
)


@pytest.fixture(scope="module")
def fit_file(tmp_path_factory):
    rng = np.random.default_rng(5)
    path = tmp_path_factory.mktemp("law") / "fit.json"
    write_law(path, fit_runs([law_run(data, rng, noise=0.001) for data in small_configs()]))
    return path


@pytest.fixture
def plan(tmp_path, fit_file):
    """Function that runs `plan --predict` on plain data."""

    def run(data, *arguments):
        path = tmp_path / "run.yaml"
        path.write_text(yaml.safe_dump(data))
        return main(["plan", str(path), "--predict", str(fit_file), *arguments])

    return run


def two_phases(**changes):
    return law_config(general_blend(), qa_blend(0.2), until={"lr": 0.2}, **changes)


def test_fit_writes_a_file_that_plan_reads(tmp_path, capsys):
    folders = [str(write_law_run(tmp_path / f"run{n}", data, seed=n)) for n, data in enumerate(small_configs())]
    assert main(["fit", *folders, "--output", str(tmp_path / "fit.json")]) == 0
    printed = capsys.readouterr().out
    assert "10 runs (10 arms, 1 seed) of up to 20.48K tokens; rates up to 0.001; shares: web 0.40 to 0.70" in printed
    assert printed.endswith(f"{tmp_path / 'fit.json'}\n")
    assert "exam" in printed
    assert "warning" not in printed
    first = (tmp_path / "fit.json").read_bytes()
    assert main(["fit", *folders, "--output", str(tmp_path / "again.json")]) == 0
    assert (tmp_path / "again.json").read_bytes() == first


def test_fit_refuses_before_it_writes(tmp_path, capsys):
    folder = write_law_run(tmp_path / "run", small_configs()[0])
    assert main(["fit", str(folder), "--output", str(tmp_path / "fit.json")]) == 2
    assert "1 run of 1 arm to fit; give at least 4 arms" in capsys.readouterr().err
    assert main(["fit", str(folder), "--output", str(tmp_path / "none" / "fit.json")]) == 2
    assert "no such folder" in capsys.readouterr().err
    assert not (tmp_path / "fit.json").exists()


def test_fit_replaces_only_a_fit_and_never_a_file_of_a_run(tmp_path, capsys):
    folders = [str(write_law_run(tmp_path / f"run{n}", data, seed=n)) for n, data in enumerate(small_configs())]
    metrics, output, link = tmp_path / "run0" / "metrics.jsonl", tmp_path / "fit.json", tmp_path / "link.json"
    link.symlink_to(metrics)
    before = metrics.read_bytes()
    for path in (metrics, link, tmp_path / "run1" / "checkpoints" / ".." / "fit.json"):
        (tmp_path / "run1" / "checkpoints").mkdir(exist_ok=True)
        assert main(["fit", *folders, "--output", str(path), "--overwrite"]) == 2
        assert "is inside the run" in capsys.readouterr().err
    assert metrics.read_bytes() == before
    for text in ("name: a run\n", '{"format": 1}', ""):
        output.write_text(text)
        assert main(["fit", *folders, "--output", str(output)]) == 2
        assert "exists already and is no fit; choose another --output, or replace it: --overwrite" in " ".join(
            capsys.readouterr().err.split()
        )
        assert output.read_text() == text
    assert main(["fit", *folders, "--output", str(output), "--overwrite"]) == 0
    assert main(["fit", *folders, "--output", str(output)]) == 0
    link.unlink()
    link.symlink_to(tmp_path / "none")
    assert main(["fit", *folders, "--output", str(link)]) == 2
    assert "is no regular file" in capsys.readouterr().err


def test_shares_that_cannot_be_told_apart_are_said_by_fit_and_by_plan(tmp_path, capsys):
    arms = [law_config(qa_blend(share), shape=shape) for share in (0.1, 0.2) for shape in ("cosine", "constant")]
    folders = [
        str(write_law_run(tmp_path / f"arm{number}" / f"seed-{seed}", data | {"seed": seed}, seed=10 * number + seed))
        for number, data in enumerate(arms)
        for seed in (1, 2)
    ]
    assert main(["fit", *folders, "--output", str(tmp_path / "fit.json")]) == 0
    told = "warning: the fitted runs have 2 independent blends of 3 sources (web, code, qa): their shares cannot be"
    printed = " ".join(capsys.readouterr().out.split())
    assert "8 runs (4 arms, 2 seeds) of up to 20.48K tokens" in printed
    assert told in printed
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(law_config(qa_blend(0.2))))
    assert main(["plan", str(tmp_path / "run.yaml"), "--predict", str(tmp_path / "fit.json")]) == 0
    assert told in " ".join(capsys.readouterr().out.split())


def test_a_run_and_its_newest_checkpoint_are_the_same_trunk(plan, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for step in (10, 20):
        folder = tmp_path / "runs" / "trunk" / "checkpoints" / f"step-{step:08d}"
        folder.mkdir(parents=True)
        (folder / "state.json").write_text(json.dumps({"train": {"step": step}}))
    for name, is_same in (
        ("runs/trunk", True),
        (str(folder), True),
        ("runs/trunk/../trunk", True),
        ("runs/trunk/checkpoints/step-00000010", False),
    ):
        assert plan(two_phases() | {"init": {"from": name}}, "--json") == 0
        notes = json.loads(capsys.readouterr().out)["prediction"]["notes"]
        assert bool(notes) != is_same, name


def test_inside_the_fitted_range_nothing_is_warned_of(plan, capsys):
    assert plan(two_phases() | {"seed": 9}) == 0
    printed = capsys.readouterr().out
    assert "expected held-out loss" in printed
    assert "as planned: rate 0.2" in printed
    assert "warning" not in printed.partition("expected held-out loss")[2]


def test_other_data_under_the_names_of_fitted_sources_is_warned_of(plan, capsys):
    data = two_phases()
    data["sources"]["web"]["path"] = "data/elsewhere"
    data["validation"]["sources"] |= {"general": "data/other_val", "new": "data/new"}
    data["sources"]["code"]["path"] = ["data/../data/code"]
    assert plan(data, "--json") == 0
    first, second = json.loads(capsys.readouterr().out)["prediction"]["notes"]
    assert "sources.web is data/elsewhere, in the fitted runs data/web: the losses hold only for" in first
    assert "validation.sources.general is data/other_val, in the fitted runs data/general_val" in second
    assert plan(data) == 0
    assert "warning: sources.web is data/elsewhere" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("rate", [1e6, 1e300])
def test_a_run_without_a_finite_loss_is_refused(plan, capsys, rate):
    assert plan(two_phases(max_lr=rate), "--json") == 2
    assert "no finite loss is expected for this run" in " ".join(capsys.readouterr().err.split())


def test_json_has_curves_intervals_and_switches(plan, capsys):
    assert plan(two_phases(), "--json", "--blend", "qa=0.05,0.3") == 0
    prediction = json.loads(capsys.readouterr().out)["prediction"]
    exam = prediction["held_out"]["exam"]
    assert exam["start"] == 5.0
    assert exam["losses"][0] == exam["lows"][0] == exam["highs"][0] == 5.0
    assert exam["low"] < exam["final"] < exam["high"]
    assert len(exam["losses"]) == len(prediction["tokens"])
    switches = prediction["switches"]
    assert [one["step"] for one in switches] == sorted(one["step"] for one in switches)
    own = next(one for one in switches if one["change"].startswith("as planned"))
    assert own["difference"] == own["difference_width"] == 0
    # Every earlier switch reads more qa, which teaches `exam`.
    assert np.all(np.diff([one["losses"]["exam"] for one in switches]) > 0)
    less, more = prediction["blends"]
    assert less["change"] == "qa 0.05 in part2"
    assert more["losses"]["exam"] < exam["final"] < less["losses"]["exam"]
    assert prediction["notes"] == []


def test_another_blend_equals_the_plan_of_that_blend(plan, capsys):
    assert plan(two_phases(), "--json", "--blend", "qa=0.3") == 0
    tried = json.loads(capsys.readouterr().out)["prediction"]["blends"][0]
    assert plan(law_config(general_blend(), qa_blend(0.3), until={"lr": 0.2}), "--json") == 0
    planned = json.loads(capsys.readouterr().out)["prediction"]["held_out"]
    for name, loss in tried["losses"].items():
        assert planned[name]["final"] == pytest.approx(loss, rel=1e-6)


def test_another_switch_equals_the_plan_of_that_switch(plan, capsys):
    assert plan(two_phases(), "--json") == 0
    switches = json.loads(capsys.readouterr().out)["prediction"]["switches"]
    tried = next(one for one in switches if one["change"] == "rate 0.5 of max_lr")
    assert plan(law_config(general_blend(), qa_blend(0.2), until={"lr": 0.5}), "--json") == 0
    planned = json.loads(capsys.readouterr().out)["prediction"]["held_out"]
    assert planned["exam"]["final"] == pytest.approx(tried["losses"]["exam"], rel=1e-6)


def test_what_lies_outside_the_fitted_runs_is_said(plan, capsys):
    data = two_phases(steps=10 * STEPS, max_lr=2e-3)
    data["phases"][1]["blend"] = {"web": 0.1, "qa": 0.9}
    data["init"] = {"from": "runs/other"}
    assert plan(data) == 0
    printed = " ".join(capsys.readouterr().out.split())
    for text in (
        "204.8K tokens, the longest fitted run has 20.48K; the sum of learning rate x tokens is",
        "the first step has rate 0.002, the fitted runs 0.001",
        "the highest rate is 0.002, of the fitted runs 0.001",
        "qa has a share of 0.00 to 0.90, in the fitted runs 0.00 to 0.30",
        "web has a share of 0.10 to 0.70, in the fitted runs 0.40 to 0.70",
        "init.from is runs/other, but the losses hold for the trunk of the fitted runs: runs/trunk",
    ):
        assert text in printed


def test_repetition_beyond_the_limit_is_marked(plan, capsys):
    data = two_phases()
    data["sources"]["qa"]["tokens"] = 600
    assert plan(data, "--json") == 0
    switches = json.loads(capsys.readouterr().out)["prediction"]["switches"]
    assert switches[0]["repeats"] == "qa 6.8 epochs"
    assert switches[-1]["repeats"] == ""


@pytest.mark.parametrize(
    ("change", "arguments", "message"),
    [
        (lambda data: data["model"].update(layers=2), (), "--predict: model: the fitted runs have other values"),
        (lambda data: data.update(seq_length=128, tokens=40_960), (), "--predict: seq_length: "),
        (lambda data: data["sources"].update(new={"path": "x", "tokens": "1M"}), (), None),
        (lambda data: None, ("--blend", "qa=1.5"), "--blend qa=1.5: give NAME=SHARE"),
        (lambda data: None, ("--blend", "qa"), "--blend qa: give NAME=SHARE"),
        (lambda data: None, ("--blend", "new=0.1"), "--predict: no fitted run reads new"),
    ],
)
def test_wrong_input_is_one_message(plan, capsys, change, arguments, message):
    data = two_phases()
    change(data)
    assert plan(data, *arguments) == (0 if message is None else 2)
    assert message is None or message in capsys.readouterr().err


def test_a_blend_needs_a_fit(tmp_path, capsys):
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(two_phases()))
    assert main(["plan", str(path), "--blend", "qa=0.1"]) == 2
    assert "needs --predict FIT.json" in capsys.readouterr().err


def test_a_source_that_no_fitted_run_reads_is_refused(plan, capsys):
    data = two_phases()
    data["sources"]["new"] = {"path": "x", "tokens": "1M"}
    data["phases"][1]["blend"]["new"] = 0.1
    assert plan(data) == 2
    assert "no fitted run reads new, so what its tokens do is unknown; the law knows web, code, qa" in (
        capsys.readouterr().err
    )


def test_the_plot_has_a_panel_of_losses(plan, tmp_path, capsys):
    assert plan(two_phases(), "--plot", str(tmp_path / "plan.svg")) == 0
    picture = (tmp_path / "plan.svg").read_text()
    assert "change of the held-out loss" in picture or picture.count('<g id="axes_') == 3


def test_one_phase_has_no_switch(plan, capsys):
    assert plan(law_config(qa_blend(0.2)), "--json") == 0
    assert json.loads(capsys.readouterr().out)["prediction"]["switches"] == []


def test_a_constant_rate_tries_tenths_of_the_steps(plan, capsys):
    data = law_config(general_blend(), qa_blend(0.2), until={"step": 30}, shape="constant")
    assert plan(data, "--json") == 0
    switches = json.loads(capsys.readouterr().out)["prediction"]["switches"]
    assert [one["step"] for one in switches] == [0, *range(4, 30, 4), 30, 32, 36, 40]
    assert switches[1]["change"] == "after 1/10 of the steps"
