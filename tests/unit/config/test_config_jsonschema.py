"""JSON schema of run.yaml: agrees with the parser, and every key has a help text."""

from __future__ import annotations

import pytest

from megatron_cpt.config import draft_config, read_mapping, run_schema

jsonschema = pytest.importorskip("jsonschema")


@pytest.fixture(scope="module")
def validator():
    schema = run_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    return jsonschema.Draft202012Validator(schema)


def test_examples_are_valid(validator, repository):
    files = [*repository.glob("examples/*/*.yaml")]
    assert repository / "examples/nemotron4_15b/run.yaml" in files
    for file in files:
        assert [error.message for error in validator.iter_errors(read_mapping(file))] == [], file


@pytest.mark.parametrize(
    "override",
    [
        "model=tiny_llama",
        "model={preset: tiny_llama, activation: swiglu, norm: rms_norm}",
        "model={layers: 2, hidden: 8, ffn_hidden: 8, heads: 2, vocab: 9}",
        "schedule.warmup=100",
        "schedule.warmup=16B",
        "schedule.warmup=0.05",
        "schedule.warmup={steps: 3}",
        "tokens=1e9",
        "sources.web.path=[a, b]",
        "precision={fp8: {recipe: delayed}}",
    ],
)
def test_schema_accepts_valid_runs(validator, run_data, override):
    draft = draft_config(run_data, [override])
    assert draft.problems == []
    key, _, _ = override.partition("=")
    data = _with(run_data, override)
    assert validator.is_valid(data), key


@pytest.mark.parametrize(
    "override",
    [
        "model={layers: 2}",
        "model=no_such",
        "schedule.warmup=x",
        "tokens=many",
        "batch.global='8'",
        "nmae=x",
        "phases=[]",
    ],
)
def test_schema_refuses_invalid_runs(validator, run_data, override):
    assert draft_config(run_data, [override]).problems != []
    assert not validator.is_valid(_with(run_data, override))


def _with(data, override):
    from megatron_cpt.config.load_run import apply_overrides

    assert apply_overrides(data, [override]) == []
    return data


def test_every_key_has_a_help_text():
    schema = run_schema()
    branches = [branch for section in schema["$defs"].values() for branch in section.get("anyOf", [section])]
    missing = [
        f"{section.get('title')}.{key}"
        for section in (schema, *branches)
        for key, value in section.get("properties", {}).items()
        if not value.get("description", "").endswith(".")
    ]
    assert missing == []
