"""The path of a run: areas equal the sum over its steps; shares follow phases and sources that end."""

from __future__ import annotations

import numpy as np
import pytest

from megatron_cpt.law.run_path import path_of_plan
from megatron_cpt.planning import build_plan
from tests.helpers.law_runs import general_blend, law_config, parse, qa_blend


@pytest.mark.parametrize(("steps", "tolerance"), [(90, 1e-12), (20_000, 1e-5)])
@pytest.mark.parametrize("shape", ["cosine", "wsd"])
def test_the_area_is_the_sum_of_rate_times_tokens(steps, tolerance, shape):
    plan = build_plan(parse(law_config(qa_blend(0.1), steps=steps, shape=shape)), {})
    path = path_of_plan(plan.to_dict(), at=[7])
    exact = np.cumsum([plan.schedule.rate(step) * plan.tokens_per_step for step in range(1, steps + 1)])
    assert path.areas[0] == 0
    np.testing.assert_allclose(path.areas[-1], exact[-1], rtol=tolerance)
    np.testing.assert_allclose(path.areas[path.knots_at([7])[0]], exact[6], rtol=1e-9)


def test_tokens_of_a_batch_ramp_and_of_phases_with_other_batches():
    data = law_config(general_blend(), qa_blend(0.2), until={"step": 20}, steps=40)
    data["batch"]["ramp_up"] = {"start": 2, "increment": 2, "samples": 24}
    data["phases"][1]["batch"] = {"global": 16}
    plan = build_plan(parse(data), {})
    path = path_of_plan(plan.to_dict())
    assert path.tokens.tolist() == [plan.after(int(step)).tokens for step in path.steps]
    np.testing.assert_allclose(
        path.areas[-1],
        sum(plan.schedule.rate(step) * plan.segment_of(step).tokens_per_step for step in range(1, plan.steps + 1)),
    )


def test_shares_change_with_the_step_after_the_switch():
    plan = build_plan(parse(law_config(general_blend(), qa_blend(0.2), until={"step": 13})), {})
    path = path_of_plan(plan.to_dict())
    qa = path.shares[:, path.sources.index("qa")]
    assert np.all(qa[path.steps[1:] <= 13] == 0)
    np.testing.assert_allclose(qa[path.steps[1:] > 13], 0.2)
    np.testing.assert_allclose(path.shares.sum(axis=1), 1.0)


def test_a_source_that_ends_leaves_its_share_to_the_others():
    data = law_config(qa_blend(0.5))
    data["sources"]["qa"] |= {"max_epochs": 1, "on_exhausted": "renormalize"}
    plan = build_plan(parse(data), {"web": 10**6, "code": 10**6, "qa": 64 * 80})
    end = plan.phases[0].ends["qa"]
    path = path_of_plan(plan.to_dict())
    qa = path.shares[:, path.sources.index("qa")]
    assert 0 < end < plan.steps
    assert np.all(qa[path.steps[1:] > end] == 0)
    np.testing.assert_allclose(path.shares[-1, :2], [0.7, 0.3])


def test_a_source_that_a_run_does_not_read_has_share_zero():
    path = path_of_plan(build_plan(parse(law_config(general_blend())), {}).to_dict())
    wider = path.with_sources(("qa", "code", "web"))
    np.testing.assert_allclose(wider.shares[0], [0.0, 0.3, 0.7])
