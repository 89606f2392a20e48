"""The complete plan: epochs, limits, totals and the output of `plan --json`."""

from __future__ import annotations

import json

import pytest

from megatron_cpt.config import draft_config
from megatron_cpt.planning import build_plan

SIZES = {"web": 1_000_000, "code": 500_000, "qa": 20_000}


def plan(data, *overrides, **options):
    draft = draft_config(data, overrides)
    return build_plan(draft.config, options.pop("sizes", SIZES), **options)


def texts(found) -> list[str]:
    return [problem.text for problem in found.problems]


def test_epochs_are_samples_by_samples_of_an_epoch(run_data):
    found = plan(run_data)
    use = found.phases[1].sources["qa"]
    assert found.phases[1].num_samples == 28 * 8
    assert use.samples == 22  # 22.4: web and code have the larger remainders
    assert use.tokens == 22 * 64
    assert use.epochs == 22 / 312  # 19,999 // 64
    assert "qa" not in found.phases[0].sources
    assert found.sources["qa"].epochs == use.epochs


def test_epochs_add_up_over_the_phases(run_data):
    found = plan(run_data)
    for name in ("web", "code"):
        assert found.sources[name].samples == sum(phase.sources[name].samples for phase in found.phases)
        assert found.sources[name].epochs == pytest.approx(sum(phase.sources[name].epochs for phase in found.phases))


def test_a_source_of_many_files_has_shorter_epochs(run_data):
    found = plan(run_data, samples_per_epoch={"qa": 11})
    assert found.sources["qa"].epochs == 2.0


def test_the_limit_is_exact(run_data):
    for limit, is_refused in ((2.0, False), (1.99, True)):
        found = plan(run_data, f"sources.qa.max_epochs={limit}", samples_per_epoch={"qa": 11})
        assert bool(found.problems) == is_refused


def test_a_source_that_runs_out(run_data):
    (problem,) = texts(plan(run_data, "sources.qa.max_epochs=2", sizes={**SIZES, "qa": 500}))
    assert problem.startswith("sources.qa.max_epochs: 2: the run reads 1.408K of its 500 tokens = 3.14 epochs")
    assert "(the limit falls in phase qa); lower its weight by a factor of 1.57" in problem


def test_a_source_that_runs_out_over_several_phases(run_data):
    """Each phase alone reads web less than twice; the run exceeds two epochs in the second phase."""
    found = plan(run_data, "sources.web.max_epochs=2", sizes={**SIZES, "web": 12_000})
    epochs = [phase.sources["web"].epochs for phase in found.phases]
    assert max(epochs) < 2 < sum(epochs)
    assert found.sources["web"].epochs == sum(epochs)
    (problem,) = texts(found)
    assert "sources.web.max_epochs: 2: " in problem
    assert "(the limit falls in phase qa)" in problem


def test_a_source_without_a_size_has_no_epochs(run_data):
    found = plan(run_data, sizes={"web": 1_000_000})
    assert found.problems == ()
    assert found.sources["qa"].epochs is None
    assert found.phases[1].sources["qa"].epochs is None


def test_a_source_smaller_than_one_sample(run_data):
    (problem,) = texts(plan(run_data, sizes={**SIZES, "qa": 64}))
    assert problem.startswith("sources.qa: 64 tokens are too few for one sample of seq_length + 1 = 65")


def test_problems_of_every_kind_come_together(run_data):
    run_data["phases"].insert(1, {"name": "middle", "blend": {"web": 1}, "until": {"step": 40}})
    found = plan(run_data, "sources.qa.max_epochs=0.01", sizes={**SIZES, "code": 10}, num_gpus=3)
    assert [text.split(":")[0] for text in texts(found)] == [
        "phases[1].until (phase middle)",
        "sources.qa.max_epochs",
        "sources.code",
        "batch.global",
    ]


def test_an_invalid_schedule_hides_only_problems_that_depend_on_rates(run_data):
    run_data["phases"][0]["until"] = {"lr": 0.2}
    assert [text.split(":")[0] for text in texts(plan(run_data, "schedule.warmup=100"))] == ["schedule.warmup"]
    run_data["phases"][0]["until"] = {"step": 100}
    assert len(texts(plan(run_data, "schedule.warmup=100"))) == 2


def test_invalid_weights_are_reported_by_the_checks_only(run_data):
    """Plan a blend without its invalid sources, and still find all other problems."""
    for weight in (0, -1):
        run_data["phases"][1]["blend"] = {"web": weight, "code": 0.9, "qa": 0.1}
        found = plan(run_data, "sources.qa.max_epochs=0.01")
        assert found.phases[1].weights == {"code": 0.9, "qa": 0.1}
        assert len(found.problems) == 1
    run_data["phases"][1]["blend"] = {"web": -1}
    assert plan(run_data).phases[1].sources == {}


def test_warnings(run_data):
    run_data["sources"]["idle"] = {"path": "x"}
    found = plan(run_data, "sources.qa.max_epochs=", "schedule.decay=0.5", sizes={**SIZES, "qa": 300})
    assert found.problems == ()
    ignored, unread, worn = found.warnings
    assert ignored == "schedule.decay has no effect with schedule.shape: cosine; remove it"
    assert unread == "in no blend and therefore never read: idle"
    assert worn.startswith("read more than 4 times: qa (5.50 times); repeated tokens")


@pytest.mark.parametrize(
    ("weights", "text"),
    [
        ((0.6, 0.4), None),
        ((0.7, 0.1 + 0.2), None),
        ((60, 40), "add up to 100 (percent), not 1; each is divided by the sum"),
        ((0.6, 0.3), "add up to 0.9, not 1; each is divided by the sum"),
    ],
)
def test_a_blend_that_does_not_add_up_to_1_is_named_with_its_sum(run_data, weights, text):
    run_data["phases"][0]["blend"] = dict(zip(("web", "code"), weights, strict=True))
    found = [line for line in plan(run_data).warnings if "blend" in line]
    assert found == (
        [] if text is None else [f"phase {run_data['phases'][0]['name']}: the weights of its blend {text}"]
    )


def test_warnings_about_very_many_sources_stay_short(run_data):
    run_data["sources"] |= {f"idle{n}": {"path": "x"} for n in range(1000)}
    (warning,) = plan(run_data).warnings
    assert warning.endswith("idle10, idle11 and 988 more")


@pytest.mark.parametrize(
    ("overrides", "num_gpus", "layout"),
    [
        ([], None, (1, 1, 4, 0.0)),
        ([], 4, (4, 4, 1, 0.0)),
        (["parallel={tensor: 2, pipeline: 2}"], None, (4, 1, 4, 1 / 5)),
        (["parallel={tensor: 2, pipeline: 2}"], 8, (8, 2, 2, 1 / 3)),
        (["parallel={pipeline: 2, virtual_pipeline: 2}"], 2, (2, 1, 4, 0.5 / 4.5)),
        (["parallel.context=2"], 4, (4, 2, 2, 0.0)),
    ],
)
def test_layouts(run_data, overrides, num_gpus, layout):
    found = plan(run_data, *overrides, num_gpus=num_gpus)
    assert found.problems == ()
    built = found.layout
    assert (built.num_gpus, built.data_parallel, built.num_micro_batches) == layout[:3]
    assert built.bubble == pytest.approx(layout[3])


@pytest.mark.parametrize(
    ("overrides", "num_gpus", "text"),
    [
        (
            ["parallel={tensor: 2, pipeline: 2}"],
            6,
            "6 ranks: not a multiple of parallel.tensor x pipeline x context = 2 x 2 x 1 = 4",
        ),
        ([], 3, "batch.global: 8 is not a multiple of batch.micro: 2 x 3 replicas"),
        ([], 8, "batch.global: 8 is not a multiple of batch.micro: 2 x 8 replicas"),
        (
            ["parallel={pipeline: 2, virtual_pipeline: 2}", "batch.global=12"],
            4,
            "batch.global: 12 makes 3 micro-batches per replica, which parallel.pipeline: 2 does not divide",
        ),
    ],
)
def test_layouts_that_do_not_fit(run_data, overrides, num_gpus, text):
    (problem,) = texts(plan(run_data, *overrides, num_gpus=num_gpus))
    assert text in problem


def test_a_layout_is_judged_by_the_batches_that_steps_have(run_data):
    for phase in run_data["phases"]:
        phase["batch"] = {"global": 6}
    assert plan(run_data, num_gpus=3).problems == ()
    assert "batch of 6 does not divide into micro-batches of 2 on 2 replicas" in texts(plan(run_data, num_gpus=2))[0]
    run_data["validation"] = {"sources": {"held": "data/held"}}  # which reads batch.global sequences at a time
    (problem,) = texts(plan(run_data, num_gpus=3))
    assert problem.startswith("batch.global: 8 is not a multiple of batch.micro: 2 x 3 replicas")


def test_the_json_has_the_documented_keys(run_data):
    values = json.loads(json.dumps(plan(run_data).to_dict(), allow_nan=False))
    assert values["steps"] == 100
    assert values["tokens"] == 51_200
    assert values["parameters"] == plan(run_data).parameters.total
    assert set(values["flops_per_token"]) == {"full", "causal"}
    assert values["memory_per_gpu_gib"] == pytest.approx(
        sum(gib for part, gib in values["memory_by_part_gib"].items() if part != "stage")
    )
    general, qa = values["phases"]
    assert {"name", "first_step", "last_step", "tokens", "lr_first", "lr_last", "sources"} <= set(general)
    assert (general["name"], general["first_step"], general["last_step"], general["tokens"]) == (
        "general",
        1,
        72,
        72 * 512,
    )
    assert general["sources"]["web"] == {"weight": 0.6, "samples": 346, "tokens": 346 * 64, "epochs": 346 / 15624}
    assert set(qa["sources"]) == {"web", "code", "qa"}


def test_tokens_are_those_asked_for_and_those_trained(run_data):
    found = plan(run_data, "tokens=51000")
    assert (found.tokens, found.steps, found.tokens_trained) == (51_000, 100, 51_200)
    assert sum(phase.tokens for phase in found.phases) == found.tokens_trained


class TestSourcesThatEnd:
    ENDING = ("sources.qa.max_epochs=1", "sources.qa.on_exhausted=renormalize")

    def test_other_sources_share_the_weight(self, run_data):
        found = plan(run_data, *self.ENDING, samples_per_epoch={"qa": 11})
        assert not found.problems
        phase = found.phases[1]
        assert phase.num_samples == 28 * 8
        # qa gives 11 samples in the first 110, in which web gives 55 and code 44; 114 are left for those two, 5 to 4
        assert {name: use.samples for name, use in phase.sources.items()} == {"web": 118, "code": 95, "qa": 11}
        assert phase.sources["qa"].epochs == found.sources["qa"].epochs == 1.0
        assert phase.sources["qa"].weight == 0.1
        assert found.span_limits == {"qa": 11}
        assert phase.ends == {"qa": phase.first_step + 110 // 8}

    def test_a_warning_says_where(self, run_data):
        found = plan(run_data, *self.ENDING, samples_per_epoch={"qa": 11})
        (line,) = [line for line in found.warnings if "source qa" in line]
        step = found.phases[1].first_step + 110 // 8
        assert line.startswith(f"source qa: ends after 1 epochs, at about step {step} (phase qa); from then on")

    def test_a_limit_that_is_not_reached_changes_nothing(self, run_data):
        limited = plan(run_data, *self.ENDING)
        assert not limited.phases[1].ends
        assert limited.phases == plan(run_data).phases
        assert limited.warnings == plan(run_data).warnings

    def test_ended_in_an_earlier_phase(self, run_data):
        renormalize = ("sources.code.max_epochs=1", "sources.code.on_exhausted=renormalize")
        found = plan(run_data, *renormalize, samples_per_epoch={"code": 40})
        assert found.sources["code"].samples == 40
        assert found.phases[1].sources["code"].samples == 0
        assert sum(use.samples for use in found.phases[1].sources.values()) == found.phases[1].num_samples
        assert len([line for line in found.warnings if "source code: ends" in line]) == 1

    def test_a_phase_without_any_source_left(self, run_data):
        both = [
            f"sources.{name}.{key}" for name in ("web", "code") for key in ("max_epochs=1", "on_exhausted=renormalize")
        ]
        (problem,) = texts(plan(run_data, *both, samples_per_epoch={"web": 200, "code": 300}))
        assert problem.startswith("phases[0] (phase general): all its sources reach max_epochs by step 63")
        assert "(76 samples are missing); raise max_epochs, add a source or shorten the run" in problem

    def test_without_a_size_it_cannot_end(self, run_data):
        found = plan(run_data, *self.ENDING, sizes={name: SIZES[name] for name in ("web", "code")})
        assert found.span_limits == {}


def test_a_profile_outside_the_run_is_a_problem(run_data):
    assert texts(plan(run_data, "profile={steps: [99, 100]}", num_gpus=1)) == []
    assert texts(plan(run_data, "profile={steps: [100, 101], ranks: [0, 1, 2]}", num_gpus=1)) == [
        "profile.steps: [100, 101] is outside the run, which has 100 steps; choose earlier steps or remove profile",
        "profile.ranks: no rank 1, 2 in a job of 1; ranks count from 0: choose others or remove ranks",
    ]
    assert texts(plan(run_data, "profile={steps: [1, 2], ranks: [7]}")) == []


def test_sequences_longer_than_those_of_pretraining_are_named(run_data):
    assert run_data["seq_length"] == 64
    assert not [text for text in plan(run_data, "model.max_positions=64").warnings if "positions" in text]
    found = [text for text in plan(run_data, "model.max_positions=32").warnings if "positions" in text]
    assert found == [
        "sequences of 64 tokens have positions beyond model.max_positions: 32, new to the model; check "
        "model.rotary_base and model.rope_scaling"
    ]


@pytest.mark.parametrize(
    ("section", "steps"),
    [
        ("{tasks: [a]}", [0, 72, 100]),
        ("{tasks: [a], every: 40, at: []}", [40, 80]),
        ("{tasks: [a], every: 36, at: [switch, end]}", [36, 72, 100]),
        ("null", []),
    ],
)
def test_evaluations_are_planned(run_data, section, steps):
    """The general phase ends with step 72 of 100."""
    found = plan(run_data, f"evaluation={section}", "tokenizer=byte")
    assert found.to_dict()["evaluation_steps"] == steps
