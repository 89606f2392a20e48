"""Values of a recipe: the paper's own run, proposals, and what a checkpoint records."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from megatron_cpt.config import ModelConfig, draft_config
from megatron_cpt.config.fields import run_schema
from megatron_cpt.config.presets import preset
from megatron_cpt.errors import UserError
from megatron_cpt.planning import build_plan
from megatron_cpt.recipe.commented_yaml import Reasoned, dump_commented, without_reasons
from megatron_cpt.recipe.compose_run import RecipeChoices, compose_run
from megatron_cpt.recipe.hold_out import RecipeSource
from megatron_cpt.recipe.pretraining import Pretraining, TrainingRecord
from megatron_cpt.recipe.training_values import choose_batch, choose_max_lr, choose_seq_length, propose_max_lr
from megatron_cpt.recipe.weak_areas import WeakArea
from tests.helpers.recipes import values_without_comment

B = 10**9


def pretraining(name: str, record: TrainingRecord | None = None) -> Pretraining:
    return Pretraining(
        path=Path("checkpoints", name),
        can_start=True,
        name=name,
        model=ModelConfig.model_validate(preset(name)),
        model_source="run.yaml",
        tokenizer=Reasoned("sentencepiece:tokenizer.model", "beside the weights"),
        record=record or TrainingRecord(),
    )


def source(name: str, tokens: int, documents: int = 1000) -> RecipeSource:
    return RecipeSource(name, [f"data/{name}"], [f"data/{name}"], [tokens], documents, [f"val/{name}"], 10**6)


def nemotron() -> RecipeChoices:
    record = TrainingRecord(
        last_rate=Reasoned(4.5e-5, "recorded"), seq_length=Reasoned(4096, "r"), global_batch=Reasoned(1152, "r")
    )
    base = pretraining("nemotron4_15b", record)
    return RecipeChoices(
        name="nemotron",
        pretraining=base,
        init_from=Reasoned("checkpoints/base", "the checkpoint"),
        tokens=300 * B,
        max_lr=choose_max_lr(base, given=None, propose=False),
        seq_length=choose_seq_length(base, None),
        global_batch=choose_batch(base, 4096, 300 * B, given=None, num_gpus=None),
        general=[source("web_hq", 900 * B), source("web", 4100 * B), source("wiki", 10 * B)],
        qa=[source("qa_stem", int(1.3 * B)), source("qa_chat", int(1.5 * B))],
        quality={"web_hq": 3.0, "wiki": 150.0},
        areas={"qa_stem": WeakArea({"mmlu_stem": 0.3}, 1.2), "qa_chat": WeakArea({"mt": 0.6}, 0.8)},
        evaluation="results.json",
    )


def test_the_run_of_the_paper() -> None:
    sections = compose_run(nemotron())
    data = without_reasons(sections)
    config = draft_config(data).finish("recipe")
    plan = build_plan(config, {s.name: s.tokens for s in (*nemotron().general, *nemotron().qa)})
    assert not plan.problems
    assert (plan.steps, plan.phases[0].last_step) == (63_579, 45_225)
    assert (plan.schedule.max_lr, plan.schedule.min_lr, plan.schedule.warmup_steps) == (4.5e-5, 4.5e-7, 0)
    # 10 % of the last 28.87 % is 8.66B of 2.8B tokens: 3.1 epochs, here shifted to the weak area
    read = plan.sources["qa_stem"].tokens + plan.sources["qa_chat"].tokens
    assert read / (2.8 * B) == pytest.approx(3.09, abs=0.01)
    assert plan.sources["qa_stem"].epochs > plan.sources["qa_chat"].epochs
    assert plan.sources["wiki"].epochs == pytest.approx(4.0, rel=2e-3)
    text = dump_commented(sections, "head")
    assert values_without_comment(text) == []
    assert "CUT from 0.1807 to stay within 4 epochs" in text


def test_keys_stand_in_the_order_of_the_reference() -> None:
    keys = list(without_reasons(compose_run(nemotron())))
    assert keys == sorted(keys, key=list(run_schema()["properties"]).index)


@pytest.mark.parametrize(
    ("name", "rate"),
    [("smollm2_135m", 6.0e-5), ("llama3_8b", 1.2e-5), ("nemotron4_15b", 1.0e-5), ("nemotron_mini_4b", 1.6e-5)],
)
def test_a_proposed_rate_is_a_tenth_of_the_peak_of_the_nearest_gpt3(name: str, rate: float) -> None:
    proposal = propose_max_lr(ModelConfig.model_validate(preset(name)))
    assert proposal.value == rate
    assert "PROPOSAL" in proposal.reason
    assert "2005.14165" in proposal.reason


def test_the_rate_is_given_or_recorded_or_asked_for() -> None:
    unknown = pretraining("llama3_8b")
    known = replace(unknown, record=TrainingRecord(last_rate=Reasoned(3e-5, "in state.json")))
    assert choose_max_lr(known, given=None, propose=True).value == 3e-5
    assert choose_max_lr(known, given=2e-5, propose=False).value == 2e-5
    assert "the checkpoint records 3e-05" in choose_max_lr(known, given=2e-5, propose=False).reason
    with pytest.raises(UserError, match=r"--max-lr RATE, or take a proposal, 1\.2e-05: --propose-lr"):
        choose_max_lr(unknown, given=None, propose=False)


@pytest.mark.parametrize(
    ("tokens", "num_gpus", "batch"), [(300 * B, None, 1152), (1000 * B, 64, 1152), (3 * B, 64, 128), (10**5, None, 1)]
)
def test_a_batch_that_is_not_recorded_follows_the_tokens(tokens: int, num_gpus: int | None, batch: int) -> None:
    assert choose_batch(pretraining("llama3_8b"), 4096, tokens, given=None, num_gpus=num_gpus).value == batch


def test_the_sequence_length_stays_within_the_positions_of_pretraining() -> None:
    base = pretraining("llama3_8b")
    assert choose_seq_length(base, None).value == 4096
    short = replace(base, model=base.model.model_copy(update={"max_positions": 2048}))
    assert choose_seq_length(short, None).value == 2048
    assert choose_seq_length(short, 512).value == 512
