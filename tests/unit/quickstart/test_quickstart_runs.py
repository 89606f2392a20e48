"""The three run.yaml files say what the recipe says, and nothing else differs between baseline and recipe."""

import math

import demo
import pytest
import sources

from megatron_cpt.config.load_run import load_config
from megatron_cpt.planning.timeline.solve_steps import solve_schedule


@pytest.fixture
def runs(quickstart):
    return {name: load_config(quickstart / f"{name}.yaml") for name in ("base", "baseline", "recipe")}


def test_baseline_and_recipe_differ_in_the_data_alone(runs):
    baseline, recipe = (runs[name].to_dict() for name in ("baseline", "recipe"))
    assert {key for key in recipe if baseline[key] != recipe[key]} == {"name", "output", "sources", "phases"}
    assert baseline["phases"][0]["blend"] == runs["base"].to_dict()["phases"][0]["blend"]


def test_the_rate_goes_on_where_pretraining_ended_and_falls_to_a_hundredth(runs):
    schedule = runs["recipe"].schedule
    assert schedule.max_lr == runs["base"].schedule.min_lr == pytest.approx(runs["base"].schedule.max_lr / 10)
    assert schedule.min_lr == pytest.approx(schedule.max_lr / 100)
    assert schedule.shape == "cosine"
    assert schedule.warmup.steps == 0


def test_the_switch_leaves_steps_to_both_phases(runs):
    recipe = runs["recipe"]
    general, qa = recipe.phases
    assert general.until.lr == 0.2
    assert qa.until is None
    # cos(pi t) = 2 (0.2 - 0.01) / (1 - 0.01) - 1: 71.13 % of the run.
    switch = math.acos(2 * (0.2 - 0.01) / 0.99 - 1) / math.pi
    steps = solve_schedule(recipe).steps
    assert 0 < switch * steps < steps - 10


def test_the_qa_blend_is_nine_tenths_of_the_general_blend(runs):
    general, qa = (phase.blend for phase in runs["recipe"].phases)
    assert sum(general.values()) == pytest.approx(1)
    assert {name: qa[name] for name in general} == pytest.approx({name: 0.9 * part for name, part in general.items()})
    assert sum(qa[name] for name in sources.QUESTIONS) == pytest.approx(0.1)


def test_questions_are_in_no_other_phase(runs):
    others = [runs["base"].phases[0], runs["baseline"].phases[0], runs["recipe"].phases[0]]
    assert [set(phase.blend) & set(sources.QUESTIONS) for phase in others] == [set(), set(), set()]


def test_files_are_those_that_the_demo_makes(runs):
    for run in runs.values():
        assert {name: source.path for name, source in run.sources.items()} == {
            name: f"data/quickstart/train/{name}" for name in run.sources
        }
    assert set(runs["base"].sources) == set(sources.PRETRAINING)
    assert set(runs["recipe"].sources) == set(sources.PRETRAINING) | set(sources.QUESTIONS)
    assert runs["recipe"].validation.sources == {name: f"data/quickstart/heldout/{name}" for name in sources.HELD_OUT}
    assert runs["recipe"].seq_length == demo.SEQ_LENGTH
