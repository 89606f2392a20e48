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
            "parallel.tensor: 4 does not divide the padded size of model.vocab: 257",
        ),
        (["parallel.pipeline=3"], "parallel.pipeline: 3 does not divide model.layers: 4"),
        (
            ["parallel.pipeline=2", "parallel.virtual_pipeline=4"],
            "2 x parallel.virtual_pipeline: 4 does not divide model.layers",
        ),
        (["evaluation={tasks: [a]}"], "evaluation: needs the tokenizer of the model to encode its tasks"),
        (
            ["evaluation={tasks: [a]}", "tokenizer=byte", "parallel.context=2"],
            "evaluation: not possible with parallel.context: 2",
        ),
        (["evaluation={tasks: []}", "tokenizer=byte"], "evaluation.tasks: []: empty; add at least one entry"),
        (
            ["evaluation={tasks: [a], at: [middle]}", "tokenizer=byte"],
            "evaluation.at[0]: \"middle\": should be 'start', 'switch' or 'end'",
        ),
        (["evaluation={tasks: [a], limits: 3}", "tokenizer=byte"], "did you mean evaluation.limit?"),
        (["teacher={weight: 0.5}"], "teacher: give exactly one of from (a checkpoint) and cache"),
        (["teacher={from: a, cache: b}"], "teacher: give exactly one of from (a checkpoint) and cache"),
        (["teacher={from: init}"], "teacher.from: init: init.from names no checkpoint"),
        (["teacher={from: a, weight: 1.5}"], "teacher.weight: 1.5: should be less than or equal to 1"),
        (["teacher={from: a, weight: -1}"], "teacher.weight: -1: should be greater than or equal to 0"),
        (["teacher={from: a, temperature: 0}"], "teacher.temperature: 0: should be greater than or equal to 0.01"),
        (["teacher={from: a, temperature: 1e300}"], "teacher.temperature: 1e+300: should be less than or equal to 100"),
        (
            ["teacher={cache: a, temperature: 2}"],
            "teacher.temperature: 2: a cache holds probabilities at temperature 1",
        ),
        (["teacher={from: a, sources: {wbe: 1}}"], "teacher.sources.wbe: not a source; did you mean web?"),
        (["teacher={from: a, sources: {web: -1}}"], "teacher.sources.web: -1: should be greater than or equal to 0"),
        (
            ["teacher={from: a, weight: 0.6, sources: {web: 2}}"],
            "teacher.sources.web: 2 x teacher.weight: 0.6 is above 1",
        ),
        (
            ["teacher={from: a, sources: {web: 0, code: 0, qa: 0}}"],
            "teacher.sources: 0 for every source, so there is no distillation",
        ),
        (["teacher={from: a, tensor: 3}"], "teacher.tensor: 3: choose 1 or parallel.tensor: 1"),
        (
            ["teacher={from: a, tensor: 1}", "parallel={tensor: 2, pipeline: 2}"],
            "teacher.tensor: 1 needs teacher.pipeline: 1",
        ),
        (
            ["teacher={from: a, pipeline: 1}", "parallel={pipeline: 2, context: 2}"],
            "teacher: a layout of its own is not possible with parallel.context: 2",
        ),
        (["parallel.pipeline=3"], "or set the layers of each chunk: parallel.pipeline_layout=[2,1,1]"),
        (
            ["parallel={pipeline: 2, pipeline_layout: [2, 1, 1]}"],
            "parallel.pipeline_layout: 3 entries, but parallel.pipeline: 2 is 2 model chunks",
        ),
        (
            ["parallel={pipeline: 2, virtual_pipeline: 2, pipeline_layout: [2, 2]}"],
            "2 entries, but parallel.pipeline: 2 x parallel.virtual_pipeline: 2 is 4 model chunks",
        ),
        (
            ["parallel={pipeline: 2, pipeline_layout: [3, 2]}"],
            "parallel.pipeline_layout: adds up to 5 layers, but model.layers is 4",
        ),
        (["parallel={pipeline: 3, pipeline_layout: [2, 0, 2]}"], "parallel.pipeline_layout: entry 1 is 0"),
        (["parallel={pipeline: 2, pipeline_layout: [5, -1]}"], "parallel.pipeline_layout[1]"),
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
            "sources.web.fim: prefix_id, middle_id, suffix_id and the end-of-document id must differ",
        ),
        ([f"seed={2**62}"], "seed: 4611686018427387904: should be less than 4611686018427387904"),
        (["batch.micro=3"], "batch.micro: 3 does not divide batch.global: 8"),
        (
            ["batch.ramp_up={start: 8, increment: 2, samples: 1K}"],
            "batch.ramp_up.start: 8 is not below batch.global: 8; choose less or remove ramp_up",
        ),
        (
            ["batch.ramp_up={start: 2, increment: 4, samples: 1K}"],
            "batch.ramp_up.increment: 4 does not lead from start: 2 to batch.global: 8; choose a divisor of 6",
        ),
        (
            ["batch.ramp_up={start: 1, increment: 1, samples: 1K}"],
            "batch.ramp_up: batches of 1, 3, 5, 7 are not multiples of batch.micro: 2",
        ),
        (
            ["batch.ramp_up={start: 2, increment: 2, samples: 1K}", "parallel={pipeline: 2, virtual_pipeline: 2}"],
            "batch.ramp_up: batches of 2, 6 make numbers of micro-batches that parallel.pipeline: 2 does not divide",
        ),
        (["batch.ramp_up={start: 2, increment: 2}"], "batch.ramp_up.samples: missing"),
        (
            ["batch={global: 100000000000000000, ramp_up: {start: 2, increment: 2, samples: 1K}}"],
            "ramp_up grows through more than 1,024 sizes; choose a larger increment",
        ),
        (["batch.ramp_up={start: 0, increment: 2, samples: 9}"], "batch.ramp_up.start: 0: "),
        (["phases.qa.batch={micro: 3}"], "phases[1].batch.micro (phase qa): 3 does not divide batch.global: 8"),
        (["phases.qa.batch={global: 5}"], "phases[1].batch.micro (phase qa): 2 does not divide batch.global: 5"),
        (
            ["phases.qa.batch={global: 6}", "parallel={pipeline: 2, virtual_pipeline: 2}"],
            "phases[1].batch.global (phase qa): 6 makes 3 micro-batches, which parallel.pipeline: 2 does not divide",
        ),
        (["phases.qa.batch.size=6"], "phases[1].batch.size: not a known key"),
        (["phases.qa.seq_length=160"], "phases[*].seq_length: 160 (phase qa) is not a multiple of 64"),
        (
            ["phases.qa.seq_length=32", "parallel={tensor: 4, context: 3}", "seq_length=96"],
            "phases[1].seq_length (phase qa): 32 is not divisible by 2 x parallel.context: 3",
        ),
        (
            ["parallel.pipeline=2", "parallel.virtual_pipeline=2", "batch.global=6"],
            "batch.global: 6 makes 3 micro-batches, which parallel.pipeline: 2 does not divide",
        ),
        (
            ["parallel.tensor=4", "parallel.sequence=true", "seq_length=66"],
            "seq_length: 66 is not divisible by parallel.tensor",
        ),
        (
            ["parallel={tensor: 4, context: 2, sequence: true}", "seq_length=68"],  # 34 on each context-parallel rank
            "seq_length: 68 is not divisible by parallel.tensor x parallel.context: 8; parallel.sequence",
        ),
        (["parallel.context=2", "seq_length=66"], "seq_length: 66 is not divisible by 2 x parallel.context: 2"),
        (["schedule.min_lr=0.1"], "schedule.min_lr: 0.1 is above schedule.max_lr: 0.001"),
        (["phases.general.blend.web=0"], "phases[0].blend.web (phase general): 0 is not a positive weight"),
        (["phases.general.blend.web=-0.5"], "phases[0].blend.web (phase general): -0.5 is not a positive weight"),
        (["phases.qa.blend.coed=1"], "phases[1].blend.coed (phase qa): not a source; did you mean code?"),
        (["phases.qa.name=general"], "phases: two phases have the name general"),
        (["phases.general.until="], "phases[0].until (phase general): missing; every phase but the last"),
        (["phases.qa.until={step: 90}"], "phases[1].until (phase qa): the last phase runs to the end"),
        (["documents.eod_id=257"], "documents.eod_id: 257 is outside model.vocab: 257"),
        (["precision={compute: fp32, fp8: {}}"], "precision.fp8: needs precision.compute: bf16"),
        (["precision.fp8={params: true}", "ema.decay=0.9"], "ema: not possible with precision.fp8.params: true"),
        (["ema.decay=1"], "ema.decay: 1: should be less than 1"),
        (["ema.decay=-0.5"], "ema.decay: -0.5: should be greater than or equal to 0"),
        (["ema.decay=.nan"], "ema.decay: NaN: not a finite number"),
        (["ema.every=0"], "ema.every: 0: should be greater than 0"),
    ],
)
def test_each_rule(run_data, overrides, problem):
    problems = draft_config(run_data, overrides).problems
    assert len(problems) == 1, problems
    assert problem in problems[0]


def test_a_batch_that_no_step_has_needs_no_divisor(run_data):
    for phase in run_data["phases"]:
        phase["batch"] = {"global": 6, "micro": 1}
    assert draft_config(run_data, ["batch.micro=3"]).problems == []
    run_data["phases"][0]["batch"] = {"global": 8, "micro": 3}  # the same batch, given by a phase
    assert len(draft_config(run_data, ["batch.micro=3"]).problems) == 2
    run_data["phases"][0]["batch"] = {"global": 6, "micro": 1}
    (problem,) = draft_config(run_data, ["batch.micro=3", "validation.sources.held=data/held"]).problems
    assert problem == "batch.micro: 3 does not divide batch.global: 8; choose a divisor"


@pytest.mark.parametrize(
    "overrides",
    [
        ["parallel={tensor: 4, pipeline: 4, sequence: true}"],
        ["parallel={pipeline: 2, virtual_pipeline: 2}"],
        ["parallel={pipeline: 3, pipeline_layout: [1, 2, 1]}"],
        ["parallel={pipeline: 2, virtual_pipeline: 2, pipeline_layout: [0, 2, 2, 0]}"],
        ["parallel.context=2"],
        ["documents={reset_attention: true, eod_id: 256}"],
        ["documents.reset_positions=true", "tokenizer=byte"],
        ["documents={reset_attention: true, eod_loss: false}"],  # the .idx knows where documents end
        ["model.rotary_percent=0.25"],
        ["schedule={shape: wsd, max_lr: 1, min_lr: 0, decay_shape: exponential}"],
    ],
)
def test_valid_combinations(run_data, overrides):
    assert draft_config(run_data, overrides).problems == []
