"""Rules between the fields of run.yaml."""

from __future__ import annotations

import pytest

from megatron_cpt.config import draft_config

FIM = "{prefix_id: 250, middle_id: 251, suffix_id: 252}"


@pytest.mark.parametrize(
    ("overrides", "problem"),
    [
        (
            ["parallel.tensor=3", "model.ffn_hidden=513"],
            "parallel.tensor: 3 does not divide model.heads: 8; choose a divisor",
        ),
        (["parallel.tensor=8"], "parallel.tensor: 8 does not divide model.kv_groups: 4"),
        (["model.kv_groups=3"], "model.kv_groups: 3 does not divide model.heads: 8"),
        (["model.heads=12", "model.head_dim="], "model.heads: 12 does not divide model.hidden: 128"),
        (["model.rotary_percent=0.3"], "model.rotary_percent: 0.3 of a head of 16 is 4.8"),
        (["parallel.tensor=4", "model.ffn_hidden=513"], "parallel.tensor: 4 does not divide model.ffn_hidden: 513"),
        (
            ["parallel.tensor=4", "model.vocab_multiple=1"],
            "parallel.tensor: 4 does not divide the padded vocabulary 257",
        ),
        (["parallel.pipeline=3"], "parallel.pipeline: 3 does not divide model.layers: 4"),
        (
            ["parallel.pipeline=2", "parallel.virtual_pipeline=4"],
            "2 x parallel.virtual_pipeline: 4 does not divide model.layers",
        ),
        (["parallel.virtual_pipeline=2"], "parallel.virtual_pipeline: 2 needs parallel.pipeline above 1"),
        (
            ["sources.web.on_exhausted=renormalize"],
            "sources.web.on_exhausted: renormalize: needs max_epochs, which says when the source has ended",
        ),
        ([f"sources.web.fim={FIM}"], "sources.web.fim: needs the end-of-document id; set tokenizer"),
        (
            [f"sources.web.fim={FIM}", "documents.eod_id=3", "model.vocab=252"],
            "sources.web.fim.suffix_id: 252 is outside model.vocab: 252",
        ),
        (
            [f"sources.web.fim={FIM}", "documents.eod_id=251"],
            "sources.web.fim: prefix_id, middle_id, suffix_id and the end-of-document id must be four different tokens",
        ),
        (["batch.micro=3"], "batch.micro: 3 does not divide batch.global: 8"),
        (
            ["parallel.pipeline=2", "parallel.virtual_pipeline=2", "batch.global=6"],
            "batch.global: 6 makes 3 micro-batches, which parallel.pipeline: 2 does not divide",
        ),
        (
            ["parallel.tensor=4", "parallel.sequence=true", "seq_length=66"],
            "seq_length: 66 is not divisible by parallel.tensor",
        ),
        (["parallel.context=2", "seq_length=66"], "seq_length: 66 is not divisible by 2 x parallel.context: 2"),
        (["schedule.min_lr=0.1"], "schedule.min_lr: 0.1 is above schedule.max_lr: 0.001"),
        (["phases.general.blend.web=0"], "phases[0].blend.web (phase general): 0 is not a positive weight"),
        (["phases.general.blend.web=-0.5"], "phases[0].blend.web (phase general): -0.5 is not a positive weight"),
        (["phases.qa.blend.coed=1"], "phases[1].blend.coed (phase qa): names no source; did you mean code?"),
        (["phases.qa.name=general"], "phases: two phases have the name general"),
        (["phases.general.until="], "phases[0].until (phase general): missing; every phase but the last"),
        (["phases.qa.until={step: 90}"], "phases[1].until (phase qa): the last phase runs to the end"),
        (["documents.reset_attention=true"], "documents.reset_attention: needs the end-of-document id"),
        (["documents.eod_id=257"], "documents.eod_id: 257 is outside model.vocab: 257"),
        (["precision={compute: fp32, fp8: {}}"], "precision.fp8: needs precision.compute: bf16"),
    ],
)
def test_each_rule(run_data, overrides, problem):
    problems = draft_config(run_data, overrides).problems
    assert len(problems) == 1, problems
    assert problem in problems[0]


@pytest.mark.parametrize(
    "overrides",
    [
        ["parallel={tensor: 4, pipeline: 4, sequence: true}"],
        ["parallel={pipeline: 2, virtual_pipeline: 2}"],
        ["parallel.context=2"],
        ["documents={reset_attention: true, eod_id: 256}"],
        ["documents.reset_positions=true", "tokenizer=byte"],
        ["model.rotary_percent=0.25"],
        ["schedule={shape: wsd, max_lr: 1, min_lr: 0, decay_shape: exponential}"],
    ],
)
def test_what_fits(run_data, overrides):
    assert draft_config(run_data, overrides).problems == []
