"""EXPERIMENT.yaml and the planning of its arms."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_cpt.errors import ConfigError, UserError
from megatron_cpt.experiment.arms import Experiment, arm_data, load_experiment

Load = Callable[..., Experiment]


def test_every_arm_and_seed_is_a_run(load: Load, tmp_path: Path) -> None:
    found = load()
    assert [unit.name for unit in found.units] == [
        f"{arm}/seed-{seed}" for arm in ("base", "same", "high") for seed in (1, 2, 3)
    ]
    last = found.units[-1]
    assert last.config.output == str(tmp_path / "grid" / "high" / "seed-3")
    assert (last.config.seed, last.config.schedule.max_lr, last.config.name) == (3, 2.0e-3, "grid/high")
    assert last.config.checkpoint.keep == 1
    assert found.baseline == "base"
    assert [metric.name for metric in found.metrics] == ["mean", "web", "code", "qa"]


def test_dotted_keys_set_values_and_sections_are_merged() -> None:
    base = {"schedule": {"max_lr": 1, "warmup": 5}, "phases": [{"name": "a", "blend": {"x": 1, "y": 2}}], "model": "m"}
    changes: dict[str, Any] = {
        "schedule": {"max_lr": 2},
        "phases.a.blend": {"x": 1},
        "sources": {"new": {"path": "p"}},
        "model": {"layers": 3},
    }
    data, problems = arm_data(base, changes)
    assert problems == []
    assert data["schedule"] == {"max_lr": 2, "warmup": 5}
    assert data["phases"] == [{"name": "a", "blend": {"x": 1}}]
    assert data["sources"] == {"new": {"path": "p"}}
    assert data["model"] == {"preset": "m", "layers": 3}
    assert base["phases"][0]["blend"] == {"x": 1, "y": 2}  # type: ignore[index]


def test_one_bad_arm_stops_all_with_one_message(load: Load) -> None:
    arms = {
        "fine": {},
        "typo": {"schedule": {"max_rl": 1.0}},
        "gone": {"phases.absent.blend": {"web": 1}},
        "broken": {"seq_length": 0},
    }
    with pytest.raises(ConfigError) as caught:
        load(arms=arms)
    text = str(caught.value)
    assert "arm typo: schedule.max_rl: not a known key; did you mean schedule.max_lr?" in text
    assert "arm gone: phases.absent.blend: phases has no entry 'absent'; choose one of general, qa" in text
    assert "arm broken: seq_length: 0" in text


def test_a_problem_of_all_arms_is_told_once(load: Load) -> None:
    with pytest.raises(ConfigError) as caught:
        load(base={"schedule": {"shape": "cosine"}}, arms={"a": {}, "b": {}})
    assert [text.partition(": missing")[0] for text in caught.value.problems] == ["all arms: schedule.max_lr"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sedes": [1]}, "sedes: not a known key; did you mean seeds?"),
        ({"seeds": [1, 1]}, "a seed is given twice"),
        ({"seeds": None}, "seeds: missing"),
        ({"baseline": "nobody"}, "baseline: 'nobody' is no arm; choose one of base, same, high"),
        ({"arms": {"a/b": {}}}, "arms: 'a/b': an arm is also a folder"),
        ({"arms": {"..": {}}}, "an arm is also a folder"),
        *(
            ({"arms": {name: {}}}, f"arms: {name!r}: the experiment writes a file or folder of this name")
            for name in ("report.html", "summary.json", "summary.md", "Summary.md", "experiment.sbatch", "logs")
        ),
        ({"arms": {"a": {"seed": 3}}}, "arms.a.seed: the experiment sets it"),
        ({"arms": {"a": {"stop_at_step": 3}}}, "arms.a.stop_at_step: the experiment sets it"),
        ({"metrics": ["wbe"]}, "metrics: 'wbe' is not measured in every arm; did you mean web?"),
        ({"metrics": ["mmlu:acc"]}, "a task needs a section `evaluation`"),
        ({"means": {"all": ["web", "law"]}}, "means.all: 'law' is not measured in every arm"),
        ({"means": {"mean": ["web"]}}, "means.mean: this name is the mean over all"),
        ({"means": {"web": ["qa"]}}, "means.web: a held-out source has this name"),
        ({"means": {"text": ["web", "qa", "web"]}}, "means.text: web: given twice"),
        ({"metrics": ["web", "qa", "web"]}, "metrics: web: given twice"),
        ({"base": {"validation": {"sources": {"mean": "a", "web": "b"}}}}, "validation.sources.mean: this name is the"),
        ({"confidence": 95}, "confidence: 95"),
        ({"slurm": {"options": ["--x\nrm -rf /"]}}, "slurm.options[0]"),
    ],
)
def test_mistakes_are_named(load: Load, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(**changes)
    assert message in str(caught.value)


def test_unequal_tokens_are_refused_unless_allowed(load: Load) -> None:
    arms = {"short": {}, "long": {"tokens": 20_480}}
    with pytest.raises(ConfigError, match=r"tokens: the arms differ in their tokens \(short 5.12K, long 20.48K\)"):
        load(arms=arms)
    assert len(load(arms=arms, equal_tokens=False).units) == 6


def test_without_held_out_data_there_is_nothing_to_compare(load: Load) -> None:
    with pytest.raises(ConfigError, match="validation: missing in the base"):
        load(base={"validation": None})


def test_a_source_that_one_arm_lacks_is_no_metric(load: Load) -> None:
    found = load(arms={"a": {}, "b": {"validation.sources": {"web": "held/web"}}})
    assert [metric.name for metric in found.metrics] == ["web"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"validation.sources.web": "held/qa"}, "validation.sources.web: the arms differ (a held/web, b held/qa)"),
        ({"validation.batches": 2}, "validation.batches x batch.global: the arms differ (a 8, b 16)"),
        ({"batch.global": 16}, "validation.batches x batch.global: the arms differ (a 8, b 16)"),
        ({"seq_length": 128}, "seq_length: the arms differ (a 64, b 128)"),
        ({"documents.eod_loss": False}, "documents.eod_loss: the arms differ (a True, b False)"),
        ({"evaluation.limit": 5}, "evaluation.limit: the arms differ (a None, b 5)"),
    ],
)
def test_arms_are_measured_on_the_same_data(load: Load, change: dict[str, Any], message: str) -> None:
    base = {"evaluation": {"at": ["end"], "tasks": ["wmt"]}, "tokenizer": "byte"}
    with pytest.raises(ConfigError) as caught:
        load(base=base, arms={"a": {}, "b": change}, metrics=["web", "wmt:ter"])
    assert message in str(caught.value)


def test_what_is_not_compared_may_differ(load: Load) -> None:
    arms: dict[str, Any] = {"a": {"batch.global": 16, "validation.batches": 1}, "b": {"validation.batches": 2}}
    assert len(load(arms=arms).units) == 6
    assert len(load(arms={"a": {}, "b": {"validation.sources.qa": "held/web"}}, metrics=["web"]).units) == 6


def test_the_trunk_is_the_checkpoint_of_now(load: Load, tmp_path: Path) -> None:
    for step in (4, 8):
        checkpoint = tmp_path / "trunk" / "checkpoints" / f"step-{step:08d}"
        checkpoint.mkdir(parents=True)
        (checkpoint / "state.json").write_text(f'{{"train": {{"step": {step}}}}}')
    arms: dict[str, Any] = {"a": {}, "random": {"init.from": None}, "other": {"init": {"from": str(tmp_path)}}}
    arms |= {"dotted": {"init.load": "weights"}, "section": {"init": {"load": "weights"}}}
    found = load(trunk=str(tmp_path / "trunk"), arms=arms)
    starts = {name: run.config.init.from_ for name, run in found.prepared.items()}
    trunk = str(checkpoint)
    assert starts == {"a": trunk, "random": None, "other": str(tmp_path), "dotted": trunk, "section": trunk}


def test_files_are_required_to_train_and_not_to_plan(write_experiment: Callable[..., Path]) -> None:
    with pytest.raises(UserError, match=r"all arms: sources.web.path: no such file: data/web.idx"):
        load_experiment(write_experiment(), need_files=True)


def test_ranks_follow_the_layout(load: Load) -> None:
    found = load(arms={"one": {}, "four": {"parallel": {"tensor": 2, "pipeline": 2}}})
    assert found.ranks == {"one": 1, "four": 4}
    with pytest.raises(ConfigError, match="arm four"):
        load(arms={"one": {}, "four": {"parallel": {"tensor": 2, "pipeline": 2}}}, ranks=2)
