"""Loading of run.yaml: a RunConfig, or a message per problem."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_cpt.config import Activation, Norm, draft_config, dump_yaml, load_config, preset_names, read_mapping
from megatron_cpt.config.presets import preset
from megatron_cpt.errors import EXIT_USER, ConfigError


def problems_of(data: dict[str, Any], *overrides: str) -> list[str]:
    return draft_config(data, overrides).problems


def test_a_valid_run(run_data):
    draft = draft_config(run_data)
    assert draft.problems == []
    config = draft.config
    assert config.tokens_per_step == 512
    assert config.model.num_kv_groups == 4
    assert config.model.padded_vocab == 384
    assert config.schedule.warmup.steps == 0
    assert config.optimizer.betas == (0.9, 0.95)
    assert config.sources["web"].tokens == 1_000_000
    assert config.sources["web"].paths == ["data/web"]


def test_drafting_does_not_change_its_input(run_data):
    before = copy.deepcopy(run_data)
    draft_config(run_data, ["parallel.tensor=2", "model=tiny_llama"])
    assert run_data == before


def test_the_resolved_file_means_the_same(run_data, tmp_path):
    config = draft_config(run_data, ["schedule.warmup=0.05", "init.from=/x", "log.wandb={project: p}"]).config
    path = tmp_path / "run.yaml"
    path.write_text(dump_yaml(config.to_dict()))
    assert load_config(path) == config
    assert draft_config(read_mapping(path)).config.to_dict() == config.to_dict()


@pytest.mark.parametrize("name", preset_names())
def test_every_preset_is_a_model(run_data, name):
    run_data["model"] = name
    config = draft_config(run_data).config
    assert config.model.preset == name
    assert draft_config({**run_data, "model": {"preset": name}}).config == config
    assert config.model.layers == preset(name)["layers"]


def test_fields_beside_a_preset_win(run_data):
    run_data["model"] = {"preset": "tiny_llama", "vocab": 500, "activation": "geglu"}
    model = draft_config(run_data).config.model
    assert (model.vocab, model.hidden, model.activation, model.gated) == (500, 128, Activation.GELU, True)


@pytest.mark.parametrize(
    ("written", "activation", "gated"),
    [
        ("relu2", Activation.SQUARED_RELU, False),
        ("SwiGLU", Activation.SILU, True),
        ("gelu_tanh", Activation.GELU_TANH, False),
    ],
)
def test_activations_under_other_names(run_data, written, activation, gated):
    run_data["model"] = {"preset": "tiny_nemotron", "activation": written, "norm": "RMS-Norm"}
    model = draft_config(run_data).config.model
    assert (model.activation, model.gated, model.norm) == (activation, gated, Norm.RMSNORM)


@pytest.mark.parametrize(
    ("override", "problem"),
    [
        ("model.layrs=3", "model.layrs: not a known key; did you mean model.layers?"),
        ("tensor=2", "tensor: not a known key; did you mean parallel.tensor?"),
        ("schedule.lr=1", "schedule.lr: not a known key; did you mean schedule.max_lr?"),
        ("batch.global_=4", "batch.global_: not a known key; did you mean batch.global?"),
        (
            "model.preset=nemotron_15b",
            "model.preset: 'nemotron_15b': no preset of that name; did you mean nemotron4_15b?",
        ),
        ("model.heads='8'", 'model.heads: "8": not a whole number; write digits without quotes'),
        ("model.heads=true", "model.heads: true: not a whole number; write digits without quotes"),
        ("model.gated='true'", 'model.gated: "true": neither true nor false; write one of them without quotes'),
        ("model.gated=1", "model.gated: 1: neither true nor false; write one of them without quotes"),
        ("model.activation=tanh", 'model.activation: "tanh": choose one of squared_relu, silu, gelu, gelu_tanh'),
        ("name=2024", "name: 2024: not text; put it in quotes"),
        ("name=''", 'name: "": empty; give it a value'),
        ("tokens=", "tokens: null: not a count; write a number such as 300B, 2.5M, 1T or 1e9"),
        ("tokens=1.5", "tokens: 1.5: not a whole count; remove the fraction"),
        ("tokens=0", "tokens: 0: should be greater than 0"),
        ("schedule.max_lr=.inf", "schedule.max_lr: Infinity: not a finite number; choose one"),
        ("schedule.max_lr='1e-4'", 'schedule.max_lr: "1e-4": not a number; write it without quotes'),
        ("schedule.warmup='100'", 'schedule.warmup: "100": not a span; write steps (100), tokens (16B) or a fraction'),
        ("schedule.warmup=-1", "schedule.warmup.steps: -1: should be greater than or equal to 0"),
        ("schedule.warmup={}", "schedule.warmup: {}: give exactly one of steps, tokens, fraction"),
        ("phases.general.until={lr: 0.2, step: 3}", "give exactly one of lr, tokens, step"),
        ("phases.general.until.lr=1", "phases[0].until.lr: 1: should be less than 1"),
        ("phases=[]", "phases: []: empty; add at least one entry"),
        ("phases.general=3", "phases[0]: 3: not a section; write key: value below it"),
        ("sources={}", "sources: {}: empty; add at least one entry"),
        ("sources.web=data/web", 'sources.web: "data/web": not a section; write key: value below it'),
        ("sources.web.path=3", "sources.web.path: 3: neither text nor a list of texts"),
        ("sources.web.path=[a, 3]", "sources.web.path[1]: 3: not text; put it in quotes"),
        ("sources.web.max_epochs=0", "sources.web.max_epochs: 0: should be greater than 0"),
        ("sources.web.fim={prefix_id: 1, middle_id: 2}", "sources.web.fim.suffix_id: missing; give it a value"),
        ("sources.web.on_exhausted=stop", "sources.web.on_exhausted: \"stop\": should be 'error' or 'renormalize'"),
        ("phases.general.blend.web='0.6'", 'phases[0].blend.web: "0.6": not a number; write it without quotes'),
        ("optimizer.betas=[0.9]", "optimizer.betas[1]: missing; give it a value"),
        ("optimizer.betas=[0.9, 1]", "optimizer.betas[1]: 1: should be less than 1"),
        ("optimizer.betas=[0.9, '0.95']", 'optimizer.betas[1]: "0.95": not a number; write it without quotes'),
        ("parallel=2", "parallel: 2: not a section; write key: value below it"),
        ("precision.compute=fp16", "precision.compute: \"fp16\": should be 'fp32' or 'bf16'"),
        (
            "validation={every: 5}",
            "validation.sources: missing; give it a value (held-out data per name: a prefix of .bin/.idx",
        ),
        ("log.wandb={}", "log.wandb.project: missing; give it a value (project in which the run appears)"),
        ("profile={}", "profile.steps: missing; give it a value (first and last step to record, counted from 1)"),
        ("profile={steps: [0, 2]}", "profile.steps[0]: 0: should be greater than 0"),
        ("profile={steps: [1, 2, 3]}", "profile.steps: [1, 2, 3]: too many entries; write [a, b]"),
        ("profile={steps: [4, 2]}", "profile.steps: [4, 2] ends before it begins; give the first and the last step"),
        ("profile={steps: [1, 2], ranks: []}", "profile.ranks: []: empty; add at least one entry"),
        ("profile={steps: [1, 2], ranks: [-1]}", "profile.ranks[0]: -1: should be greater than or equal to 0"),
        ("checkpoint.at_end='no'", 'checkpoint.at_end: "no": neither true nor false'),
        ("=3", "'=3': not an override; write key=value, such as parallel.tensor=2"),
        ("parallel.tensor", "'parallel.tensor': not an override"),
        ("phases.nope.until.lr=0.1", "phases has no entry 'nope'; choose one of general, qa"),
        ("tokens.x=1", "tokens is a plain value: 51200, which has no keys; set it as a whole"),
        ("parallel.tensor=[", "'parallel.tensor=[': not valid YAML"),
    ],
)
def test_one_wrong_value_is_one_problem(run_data, override, problem):
    problems = problems_of(run_data, override)
    assert len(problems) == 1, problems
    assert problem in problems[0]


def test_whole_numbers_may_stand_for_fractions(run_data):
    run_data["phases"][0]["blend"] = {"web": 6, "code": 4}
    draft = draft_config(run_data, ["optimizer.eps=1", "sources.qa.max_epochs=3"])
    assert draft.problems == []
    assert draft.config.phases[0].blend == {"web": 6.0, "code": 4.0}


@pytest.mark.parametrize(
    ("override", "lr"),
    [("phases.general.until.lr=0.5", 0.5), ("phases.0.until.lr=0.5", 0.5), ("phases[0].until.lr=0.5", 0.5)],
)
def test_entries_of_lists_by_name_and_by_number(run_data, override, lr):
    assert draft_config(run_data, [override]).config.phases[0].until.lr == lr


def test_overrides_make_the_sections_they_need(run_data):
    config = draft_config(run_data, ["recompute.granularity=full", "checkpoint.async=true", "init.from=/a=b"]).config
    assert config.recompute.granularity == "full"
    assert config.checkpoint.async_ is True
    assert config.init.from_ == "/a=b"


def test_an_override_below_a_model_in_its_short_form(run_data):
    run_data["model"] = "tiny_llama"
    model = draft_config(run_data, ["model.vocab=300"]).config.model
    assert (model.preset, model.vocab) == ("tiny_llama", 300)


def test_many_problems_come_at_once(run_data, write_run):
    run_data["shedule"] = {}
    run_data["model"]["heads"] = "eight"
    run_data["batch"] = {"global": 9, "micro": 2}
    run_data["phases"][0]["blend"] = {"web": 0, "wbe": 1, "code": -1}
    run_data["parallel"] = {"pipeline": 3}
    with pytest.raises(ConfigError) as caught:
        load_config(write_run(run_data))
    error = caught.value
    assert error.exit_status == EXIT_USER
    expected = [
        "shedule",
        "model.heads",
        "batch.micro: 2 does not divide batch.global: 9",
        "blend.web (phase general): 0 is",
    ]
    expected += [
        "blend.wbe (phase general): not a source; did you mean web?",
        "blend.code (phase general): -1 is not",
    ]
    expected += ["parallel.pipeline: 3 does not divide model.layers: 4"]
    assert len(error.problems) == len(expected)
    for text in expected:
        assert sum(text in problem for problem in error.problems) == 1, text


def test_what_is_missing_is_named_with_its_meaning():
    draft = draft_config({})
    missing = {problem.split(":")[0] for problem in draft.problems}
    assert missing == {"name", "output", "model", "seq_length", "batch", "tokens", "schedule", "sources", "phases"}
    assert "seq_length: missing; give it a value (tokens per sequence)" in draft.problems


def test_rules_skip_stand_ins(run_data):
    """A text where the heads should be says nothing about whether they can be split."""
    problems = problems_of(run_data, "model.heads=x", "parallel.tensor=3")
    assert any("model.heads" in problem for problem in problems)
    assert not any("does not divide model.heads" in problem for problem in problems)
    assert any("parallel.tensor: 3 does not divide model.ffn_hidden: 512" in problem for problem in problems)


def test_tainted_keys(run_data):
    draft = draft_config(run_data, ["sources.web.tokens=x", "parallel=3"])
    assert draft.tainted == {"sources.web.tokens", "parallel"}
    assert not draft.is_valid("parallel.tensor")
    assert draft.is_valid("sources", "sources.web.path", "sources.webb")
    assert not draft.is_untouched("sources")
    assert draft.is_untouched("sources.code", "sources.web.path")


JUNK = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**63), 2**63 - 1),
    st.floats(),
    st.text(max_size=5),
    st.sampled_from(["8", "true", "1e-4", "300B", "cosine", "tiny_llama"]),
    st.lists(st.one_of(st.integers(-2, 2), st.text(max_size=2)), max_size=3),
    st.dictionaries(st.sampled_from(["name", "path", "lr", "steps", "preset", "x"]), st.integers(-2, 2), max_size=3),
)


def paths(value: Any, path: tuple[str | int, ...] = ()) -> list[tuple[str | int, ...]]:
    entries = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [found for key, entry in entries for found in ((*path, key), *paths(entry, (*path, key)))]


FULL_RUN: dict[str, Any] = {
    "name": "small",
    "output": "runs/small",
    "model": {"preset": "tiny_llama", "ffn_hidden": 352, "rope_scaling": {"factor": 8.0}},
    "init": {"from": "a", "load": "weights"},
    "seq_length": 64,
    "batch": {"global": 8, "micro": 2},
    "tokens": 51_200,
    "schedule": {"shape": "wsd", "max_lr": 1.0e-3, "min_lr": 1.0e-5, "warmup": 5, "decay": {"fraction": 0.5}},
    "optimizer": {"betas": [0.9, 0.95]},
    "sources": {"web": {"path": ["a", "b"], "tokens": "1M", "max_epochs": 4}},
    "phases": [{"name": "general", "blend": {"web": 1}, "until": {"lr": 0.2}}, {"name": "qa", "blend": {"web": 0.5}}],
    "documents": {"eod_id": 3},
    "parallel": {"tensor": 2},
    "precision": {"compute": "bf16", "fp8": {"recipe": "delayed"}},
    "validation": {"sources": {"web": "x", "code": ["y"]}},
    "log": {"wandb": {"project": "p"}},
}


def test_the_full_run_is_valid():
    assert problems_of(FULL_RUN) == []


@given(st.lists(st.tuples(st.sampled_from(paths(FULL_RUN)), JUNK), min_size=1, max_size=4))
def test_junk_anywhere_is_reported_and_never_a_crash(replacements):
    data = copy.deepcopy(FULL_RUN)
    for (*parents, last), junk in replacements:
        holder: Any = data
        for key in parents:
            holder = holder[key] if isinstance(holder, dict) and key in holder else None
        if isinstance(holder, dict):
            holder[last] = junk
    draft = draft_config(data)
    assert draft.config is not None
    assert len(set(draft.problems)) == len(draft.problems)
    if not draft.problems:
        assert draft_config(draft.config.to_dict()).config == draft.config
