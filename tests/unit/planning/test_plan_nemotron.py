"""The Nemotron-4 15B example agrees with the paper, and its README with the plan."""

from __future__ import annotations

import math
import re
import shlex
from pathlib import Path

import pytest

from megatron_cpt.cli import main
from megatron_cpt.prepare import PreparedRun, prepare_run

FOLDER = Path(__file__).parents[3] / "examples" / "nemotron4_15b"
README = (FOLDER / "README.md").read_text()
EXPERIMENTS = [
    (name.strip(), overrides.strip().strip("`"), int(last.replace(",", "")), epochs.strip())
    for name, overrides, last, epochs in re.findall(r"^\| (.+?) \| (.*?) ?\| ([\d,]+) \| ([\d.]+) \|$", README, re.M)
]


@pytest.fixture(scope="module")
def example() -> PreparedRun:
    return prepare_run(FOLDER / "run.yaml", need_files=False)


def test_numbers_of_the_paper(example):
    config, plan = example.config, example.plan
    assert plan.tokens_per_step == 4_718_592
    assert plan.steps == 63_579 == math.ceil(63_578.3)
    general, qa = plan.phases
    assert (general.first_step, general.last_step, qa.first_step, qa.last_step) == (1, 45_225, 45_226, 63_579)
    assert general.lr_first == 4.5e-5
    assert general.lr_last > 9.0e-6 >= qa.lr_first
    assert plan.schedule.rate(63_580) == 4.5e-7
    assert config.optimizer.model_dump() == {
        **{"name": "adam", "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1, "clip_grad": 1.0},
        "moments": "fp32",
    }
    assert (config.batch.global_, config.seq_length, config.model.preset) == (1152, 4096, "nemotron4_15b")


def test_qa_is_read_3_1_times(example):
    use = example.plan.phases[1].sources["qa"]
    assert use.weight == pytest.approx(0.1)
    assert round(use.tokens / 1e9, 2) == 8.66
    assert round(use.epochs, 1) == 3.1
    assert example.plan.sources["qa"].max_epochs == 4


def test_the_qa_blend_is_nine_tenths_of_the_general_blend(example):
    general, qa = (phase.weights for phase in example.plan.phases)
    assert sum(general.values()) == pytest.approx(1)
    assert {name: pytest.approx(0.9 * weight) for name, weight in general.items()} | {"qa": pytest.approx(0.1)} == qa


def test_declared_sizes_are_the_pretraining_corpus(example):
    sizes = {name: size for name, size in example.source_tokens.items() if name != "qa"}
    assert sum(sizes.values()) == 8 * 10**12
    assert sizes["code"] == 0.15 * 8e12
    assert sizes["multilingual"] + sizes["parallel_text"] == 0.15 * 8e12


def test_the_readme_shows_the_real_plan(example, capsys, monkeypatch):
    monkeypatch.chdir(FOLDER.parents[1])
    assert main(["plan", "examples/nemotron4_15b/run.yaml", "--gpus", "32"]) == 0
    assert capsys.readouterr().out.rstrip("\n") in README
    assert main(["plan", "examples/nemotron4_15b/run.yaml", "phases.qa.blend.qa=0.2"]) == 2
    refusal = capsys.readouterr().err.splitlines()
    assert all(line.rstrip() in README for line in refusal)


def test_the_readme_lists_the_experiments():
    assert len(EXPERIMENTS) == README.count("\n| ") - 2  # without the head and the rule below it
    assert len(EXPERIMENTS) >= 20


@pytest.mark.parametrize(("name", "overrides", "last_step", "epochs"), EXPERIMENTS, ids=[e[0] for e in EXPERIMENTS])
def test_every_experiment_can_be_planned(name, overrides, last_step, epochs):
    plan = prepare_run(FOLDER / "run.yaml", shlex.split(overrides), need_files=False).plan
    assert plan.phases[0].last_step == last_step
    assert f"{plan.sources['qa'].epochs:.2f}" == epochs
