"""Ranking of arms, and the report of an experiment."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import orjson
import pytest

from megatron_cpt.experiment.arms import Experiment, Metric, load_experiment
from megatron_cpt.experiment.compare_arms import compare_arms, rank_arms
from megatron_cpt.experiment.experiment_file import RESULT_NAMES
from megatron_cpt.experiment.experiment_page import experiment_page, write_results
from megatron_cpt.experiment.held_out_bytes import bits_per_byte_scales
from megatron_cpt.experiment.run_units import train_units
from megatron_cpt.experiment.slurm_array import write_array
from megatron_cpt.experiment.unit_result import UnitResult
from megatron_cpt.report.html_page import html_page
from megatron_cpt.views.experiment_plot import PlottedArm, plot_differences

Load = Callable[..., Experiment]


def verdicts(values: dict[str, dict[int, float]], *, is_lower_better: bool = True) -> dict[str, str]:
    return {row.arm: row.verdict for row in rank_arms(values, "base", 0.95, is_lower_better=is_lower_better)}


def test_the_best_arm_comes_first() -> None:
    values = {"base": {1: 5.0, 2: 5.2, 3: 5.1}, "low": {1: 4.5, 2: 4.7, 3: 4.61}, "noisy": {1: 4.9, 2: 5.4, 3: 5.1}}
    assert verdicts(values) == {"low": "better", "base": "baseline", "noisy": "noise"}
    assert list(verdicts(values)) == ["low", "base", "noisy"]
    assert verdicts(values, is_lower_better=False)["low"] == "worse"


def test_pairing_by_seed_finds_what_the_means_hide() -> None:
    # The seeds differ by 1, the arms by 0.01 with every seed.
    rows = rank_arms(
        {"base": {1: 5.0, 2: 6.0, 3: 7.0}, "arm": {1: 4.99, 2: 5.99, 3: 6.9901}}, "base", 0.95, is_lower_better=True
    )
    assert rows[0].verdict == "better"
    assert rows[0].half_width is not None
    assert rows[0].half_width > 1


def test_many_arms_are_corrected() -> None:
    # p is 0.02 for each arm: enough for one, too much for five.
    arm = {1: 5.0 + 0.1, 2: 5.0 + 0.125, 3: 5.0 + 0.15}
    base = dict.fromkeys(arm, 5.0)
    assert verdicts({"base": base, "a": arm})["a"] == "worse"
    many = verdicts({"base": base, **dict.fromkeys("abcde", arm)})
    assert set(many.values()) == {"baseline", "noise"}


def test_one_seed_claims_nothing(load: Load) -> None:
    assert verdicts({"base": {1: 5.0}, "arm": {1: 1.0}})["arm"] == "one seed"


def test_seeds_that_one_arm_lacks_are_not_compared() -> None:
    rows = rank_arms({"base": {1: 5.0, 2: 5.1, 3: 9.0}, "arm": {1: 4.9, 2: 5.0}}, "base", 0.95, is_lower_better=True)
    difference = next(row.difference for row in rows if row.arm == "arm")
    assert difference is not None
    assert (difference.num_seeds, difference.mean) == (2, pytest.approx(-0.1))


def test_ties_are_named_for_every_pair() -> None:
    values = {"base": {1: 5.0, 2: 5.1, 3: 5.2}, "twin": {1: 5.0, 2: 5.1, 3: 5.2}, "far": {1: 3.0, 2: 3.1, 3: 3.201}}
    tied = {row.arm: list(row.tied_with) for row in rank_arms(values, "base", 0.95, is_lower_better=True)}
    assert tied == {"far": [], "base": ["twin"], "twin": ["base"]}


def test_values_that_are_not_finite_are_named(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    found = load(seeds=[1], metrics=["web"])

    def result(unit: object) -> UnitResult:
        is_diverged = getattr(unit, "arm", "") == "high"
        return UnitResult(10, {"web": math.nan if is_diverged else 5.0}, {}, {})

    monkeypatch.setattr("megatron_cpt.experiment.compare_arms.read_result", result)
    comparison = compare_arms(found)
    assert comparison.not_finite == ["high/seed-1 (web)"]
    assert [row.arm for row in comparison.rankings[0].rows] == ["base", "same", "high"]
    assert "Without a finite value: high/seed-1 (web)." in comparison.sentences()
    assert "NaN" not in orjson.dumps(comparison.to_dict(), option=orjson.OPT_NON_STR_KEYS).decode()


def test_the_task_says_which_direction_is_better(load: Load) -> None:
    evaluation = {"at": ["end"], "tasks": ["wmt"]}
    found = load(base={"evaluation": evaluation, "tokenizer": "byte"}, metrics=["wmt:ter"])
    for unit in found.units:
        directions = {"wmt": {"ter": False}}
        content = {
            "format": "megatron-cpt experiment run",
            "format_version": 1,
            "steps": 10,
            "held_out": {},
            "source_tokens": {},
        }
        content |= {"tasks": {"wmt": {"ter,none": 40.0}}, "higher_is_better": directions, "inputs": {}}
        unit.folder.mkdir(parents=True)
        (unit.folder / "result.json").write_bytes(orjson.dumps(content))
    assert compare_arms(found).rankings[0].is_lower_better, "translation errors"


def test_a_mean_over_sources(load: Load) -> None:
    found = load(means={"text": ["web", "qa"]}, metrics=["text"])
    result = UnitResult(10, {"web": 4.0, "qa": 2.0, "code": 9.0}, {"task": {"acc,none": 0.5}}, {})
    assert result.value(found.metrics[0], {"web": 1.0, "qa": 2.0, "code": 1.0}) == 4.0
    assert result.value(Metric("task:acc", task=("task", "acc")), {}) == 0.5
    assert math.isnan(result.value(Metric("task:f1", task=("task", "f1")), {}))


def test_bits_per_byte_counts_the_bytes_of_the_text(
    load: Load, write_pair: Callable[..., object], tmp_path: Path
) -> None:
    text = "naïve text".encode()  # 11 bytes in 11 tokens, and the token that ends the document
    write_pair(tmp_path / "held", [[*text, 256], [*text, 256]])
    validation = {"batches": 1, "sources": {"web": str(tmp_path / "held")}}
    found = load(base={"validation": validation, "tokenizer": "byte"})
    scales = bits_per_byte_scales(found.units[0].config)
    assert scales == {"web": pytest.approx(12 / 11 / math.log(2))}


@pytest.mark.usefixtures("stand_in")
def test_the_report_has_every_arm(write_experiment: Callable[..., Path], tmp_path: Path) -> None:
    found = load_experiment(write_experiment(seeds=[1, 2]), need_files=False)
    found.output.mkdir()
    train_units(found, found.units, jobs=2, tell=lambda _: None, advance=lambda _: None)
    comparison = compare_arms(found)
    write_array(found, found.units, jobs=None)
    names = [path.name for path in write_results(found, comparison)]
    assert names == ["report.html", "summary.json", "summary.md"]
    arms = set(found.config.arms)
    others = {path.name for path in found.output.iterdir()} - arms - {"starts.txt"}  # written by the stand-in
    assert others == set(RESULT_NAMES)
    page = (found.output / "report.html").read_text()
    assert 'class="error' in page
    for text in ("difference from base", "schedule.max_lr", "high/seed-2", "not told apart from"):
        assert text in page
    summary = orjson.loads((found.output / "summary.json").read_bytes())
    assert summary["rankings"][0]["rows"][0]["arm"] == "high"
    assert summary["rankings"][0]["rows"][0]["values"].keys() == {"1", "2"}
    markdown = (found.output / "summary.md").read_text()
    assert "| high | " in markdown
    assert html_page(experiment_page(found, comparison)) == page


def test_the_picture_has_a_panel_per_metric(tmp_path: Path) -> None:
    arms = [PlottedArm("low", -0.1, 0.02, "better"), PlottedArm("$x$", 0.1, None, "one seed")]
    plot_differences("grid", {"mean": arms, "web": [], "code": arms[:1]}, tmp_path / "grid.svg")
    assert (tmp_path / "grid.svg").read_text().count('id="axes_') == 3
