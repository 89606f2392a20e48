"""The fit of the law: it finds a known law again, and its intervals contain what they promise."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from megatron_cpt.errors import RefusedError, UserError
from megatron_cpt.law.fit_runs import fit_runs
from megatron_cpt.law.fitted_law import CONFIDENCE, jackknife_variance
from megatron_cpt.law.law_file import read_law, write_law
from megatron_cpt.law.predict import predict_run
from megatron_cpt.law.run_path import path_of_plan
from megatron_cpt.law.student_t import quantile
from megatron_cpt.law.terms import LawShape, terms
from megatron_cpt.planning import build_plan
from tests.helpers.law_runs import (
    STEPS,
    TRUNK_LOSSES,
    arm_configs,
    general_blend,
    law_config,
    law_run,
    parse,
    qa_blend,
    small_configs,
    true_losses,
)


def fitted(seed, *, noise):
    rng = np.random.default_rng(seed)
    return fit_runs([law_run(data, rng, noise=noise, name=str(n)) for n, data in enumerate(small_configs())])


@pytest.fixture(scope="module")
def law():
    return fitted(0, noise=0.002)


def test_a_law_without_noise_is_found_again_and_extrapolates_twentyfold():
    exact = fitted(0, noise=0.0)
    for data in arm_configs(20 * STEPS):
        path = path_of_plan(build_plan(parse(data), {}).to_dict())
        for name, forecast in exact.forecast(path).items():
            np.testing.assert_allclose(forecast.loss, true_losses(path, name), rtol=0.01)


@pytest.mark.parametrize("times", [1, 4])
def test_intervals_contain_nine_of_ten_new_runs(times):
    inside = []
    for seed in range(3):
        law, rng = fitted(seed, noise=0.004), np.random.default_rng(100 + seed)
        for data in arm_configs(STEPS * times):
            run = law_run(data, rng, noise=0.004)
            for name, forecast in law.forecast(run.path).items():
                inside.append(forecast.low[-1] <= run.losses[name][-1] <= forecast.high[-1])
    assert len(inside) == 30
    assert sum(inside) >= 25  # 27 expected; 24 or fewer have a probability of 7 % at 90 %


def test_the_interval_starts_at_nothing_and_widens_beyond_the_fitted_runs(law):
    path = path_of_plan(build_plan(parse(law_config(qa_blend(0.2), steps=8 * STEPS)), {}).to_dict())
    width = law.forecast(path)["exam"].width
    assert width[0] == 0
    assert width[-1] > 2 * width[np.searchsorted(path.areas, law.fitted.area)]


def test_one_outlier_does_not_move_the_fit():
    rng = np.random.default_rng(1)
    runs = [law_run(data, rng, noise=0.001) for data in small_configs()]
    clean = fit_runs(runs)
    runs[2].losses["exam"][4] *= 1.5
    spoiled = fit_runs(runs)
    path = path_of_plan(build_plan(parse(law_config(qa_blend(0.2))), {}).to_dict())
    ends = [one.forecast(path)["exam"].loss[-1] for one in (clean, spoiled)]
    np.testing.assert_allclose(*ends, rtol=0.005)


def test_a_prediction_starts_at_the_median_and_each_run_counts_from_its_own_start():
    rng = np.random.default_rng(2)
    runs = [law_run(data | {"seed": number}, rng, noise=0.0) for number, data in enumerate(small_configs())]
    for run, start in zip(runs, [3.0, 3.002, 2.998, 3.0, 3.0] * 2, strict=True):
        run.losses["general"] *= start / 3.0
        run.start["general"] = start
    law, exact = fit_runs(runs), fitted(2, noise=0.0)
    path = path_of_plan(build_plan(parse(law_config(qa_blend(0.2))), {}).to_dict())
    forecast, expected = (one.forecast(path)["general"] for one in (law, exact))
    assert forecast.start == 3.0
    assert forecast.width[0] == 0
    np.testing.assert_allclose(forecast.loss, expected.loss, rtol=1e-9)


def test_a_second_seed_with_equal_losses_changes_no_error():
    rng = np.random.default_rng(4)
    runs = [law_run(data, rng, noise=0.004, name=str(number)) for number, data in enumerate(small_configs())]
    twins = [replace(run, folder=f"{run.folder}b", config={**run.config, "seed": 2}) for run in runs]
    one, two = fit_runs(runs), fit_runs([*runs, *twins])
    assert (one.num_seeds, two.num_seeds) == (1, 2)
    assert two.arms == tuple((str(number), f"{number}b") for number in range(10))
    path = path_of_plan(build_plan(parse(law_config(qa_blend(0.25))), {}).to_dict())
    for first, second in zip(one.held_out, two.held_out, strict=True):
        assert len(second.without) == 10
        assert second.error == pytest.approx(first.error, rel=1e-6)
        assert second.error_per_doubling == pytest.approx(first.error_per_doubling, rel=1e-6)
        width = two.forecast(path)[first.name].width
        np.testing.assert_allclose(width, one.forecast(path)[first.name].width, rtol=1e-6)


def test_seeds_weigh_their_arm_once():
    rng = np.random.default_rng(6)
    runs = [law_run(data, rng, noise=0.0, name=str(number)) for number, data in enumerate(small_configs())]
    for values in runs[1].losses.values():
        values[-1] *= 1.02  # the only error: at the end of the arm with five seeds
    many = [replace(runs[1], folder=f"b{number}") for number in range(4)]
    law = fit_runs([*runs, *many])
    assert [len(arm) for arm in law.arms] == [1, 5, *[1] * 8]
    for one in law.held_out:
        assert 0.02 / np.sqrt(10) < one.error < 0.02 * np.sqrt(5 / 14)  # at least the bound if each run counted


def test_four_runs_of_three_arms_with_points_are_refused():
    rng = np.random.default_rng(7)
    runs = [law_run(data, rng, noise=0.001) for data in small_configs()[:4]]
    runs[1].losses["exam"][:] = np.nan
    runs.append(law_run(small_configs()[0] | {"seed": 2}, rng, noise=0.001))
    with pytest.raises(UserError, match=r"source exam: 40 points of 3 arms, .* needs 14 points of 4 arms"):
        fit_runs(runs)


def test_an_arm_without_losses_of_one_held_out_source_counts_for_the_others():
    rng = np.random.default_rng(8)
    runs = [law_run(data, rng, noise=0.001) for data in small_configs()]
    runs[1].losses["exam"][:] = np.nan
    law = fit_runs(runs)
    plan = build_plan(parse(law_config(general_blend(), qa_blend(0.2), until={"lr": 0.2})), {})
    assert [len(one.without) for one in law.held_out] == [10, 10]
    assert predict_run(law, parse(law_config(general_blend(), qa_blend(0.2), until={"lr": 0.2})), plan).switches


@pytest.mark.parametrize(
    ("blends", "told"),
    [
        ([general_blend(), qa_blend(0.3)] * 2, "2 independent blends of 3 sources (web, code, qa)"),
        # Three blends, but web and code always move together.
        ([general_blend(), qa_blend(0.1), qa_blend(0.2), qa_blend(0.3)], "2 independent blends of 3 sources"),
        ([general_blend()] * 4, "1 independent blend of 2 sources (web, code)"),
        ([general_blend(), {"web": 0.695, "code": 0.305}] * 2, "1 independent blend of 2 sources"),
        ([general_blend(), {"web": 0.67, "code": 0.33}] * 2, None),
        ([{"web": 1.0}] * 4, None),
        ([general_blend(), qa_blend(0.3), {"web": 0.4, "code": 0.5, "qa": 0.1}, qa_blend(0.1)], None),
    ],
)
def test_shares_that_cannot_be_told_apart_are_a_warning(blends, told):
    rng = np.random.default_rng(9)
    runs = [
        law_run(law_config(blend, shape=shape) | {"seed": seed}, rng, noise=0.001)
        for blend, shape in zip(blends, ("cosine", "wsd", "constant", "linear"), strict=True)
        for seed in (1, 2)
    ]
    warnings = fit_runs(runs).warnings
    assert len(warnings) == (told is not None)
    assert told is None or f"the fitted runs have {told}" in warnings[0]


def test_switches_between_two_blends_tell_two_sources_apart_and_not_three():
    rng = np.random.default_rng(10)
    runs = [
        law_run(law_config(general_blend(), qa_blend(0.2), until={"lr": rate}), rng, noise=0.001)
        for rate in (0.2, 0.4, 0.6, 0.8)
    ]
    assert "2 independent blends of 3 sources" in fit_runs(runs).warnings[0]
    runs = [
        law_run(law_config({"web": 1.0}, {"web": 0.5, "code": 0.5}, until={"lr": rate}), rng, noise=0.001)
        for rate in (0.2, 0.4, 0.6, 0.8)
    ]
    assert fit_runs(runs).warnings == ()


def test_too_few_points_are_refused():
    rng = np.random.default_rng(3)
    runs = [law_run(data, rng, noise=0.001) for data in small_configs()[:4]]
    for run in runs:
        for values in run.losses.values():
            values[3:] = np.nan
    with pytest.raises(UserError, match=r"source general: 12 points of 4 arms, but the law has 7 coefficients"):
        fit_runs(runs)


def test_the_file_gives_the_same_law(law, tmp_path):
    write_law(tmp_path / "fit.json", law)
    again = read_law(tmp_path / "fit.json")
    path = path_of_plan(build_plan(parse(law_config(general_blend(), steps=500)), {}).to_dict())
    for name in TRUNK_LOSSES:
        one, other = law.forecast(path)[name], again.forecast(path)[name]
        assert np.array_equal(one.loss, other.loss)
        assert np.array_equal(one.width, other.width)


def changed(edit):
    """Return a function that edits the parsed text of a file."""

    def change(text):
        content = json.loads(text)
        edit(content)
        return json.dumps(content)

    return change


def exam(law):
    return law["held_out"]["exam"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: text.replace('"format": 1', '"format": 2'), "its format is 2, this version reads 1"),
        (lambda text: "[1, 2]", "its format is None"),
        (lambda text: text[:200], "no JSON"),
        (lambda text: text.replace('"coefficients": [', '"coefficients": ["x",', 1), "damaged"),
        (lambda text: text.replace('"area": ', '"area": -', 1), "damaged"),
        (lambda text: text.replace('"start": ', '"start": -', 1), "damaged"),
        (lambda text: text.replace('"arms": [', '"arms": [["x"],', 1), "damaged"),
        (lambda text: text.replace('"without"', '"other"', 1), "damaged"),
        (changed(lambda law: exam(law)["fit"]["coefficients"].__setitem__(0, 1e5)), "damaged"),
        (changed(lambda law: exam(law)["fit"]["shape"].update(learning=5e-324)), "damaged"),
        (changed(lambda law: exam(law).update(error="nan")), "damaged"),
        (changed(lambda law: exam(law).update(error="Infinity")), "damaged"),
        (changed(lambda law: exam(law).update(error=-5)), "damaged"),
        (changed(lambda law: exam(law)["without"].pop()), "damaged"),
        (changed(lambda law: law["sources"].reverse()), "damaged"),
        (changed(lambda law: law.update(trunks="runs/trunk")), "damaged"),
        (changed(lambda law: law.update(trunks=[1])), "damaged"),
        (changed(lambda law: law.update(held_out={})), "damaged"),
        (changed(lambda law: law.update(format=True)), "damaged"),
        (changed(lambda law: law.pop("checksum")), "damaged"),
        (lambda text: text.replace('"notes": []', '"notes": ' + "[" * 500 + "]" * 500), "damaged"),
    ],
)
def test_a_damaged_file_or_another_version_is_refused(law, tmp_path, change, message):
    path = tmp_path / "fit.json"
    write_law(path, law)
    text = path.read_text()
    damaged = change(text)
    assert damaged != text
    path.write_text(damaged)
    with pytest.raises(RefusedError, match=message):
        read_law(path)


def test_a_file_with_other_spaces_is_the_same_law(law, tmp_path):
    path = tmp_path / "fit.json"
    write_law(path, law)
    path.write_text(json.dumps(json.loads(path.read_text())))
    assert read_law(path).sources == law.sources


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(UserError, match="cannot be read"):
        read_law(tmp_path / "none.json")


def test_terms_follow_their_equations():
    path = path_of_plan(build_plan(parse(law_config(qa_blend(0.25), shape="constant")), {}).to_dict())
    path = path.with_sources(("qa",))
    shape = LawShape(path.areas[-1], 1e-3, annealing=4.0, shift=2.0, learning=0.5, exponent=0.5)
    columns, reach = terms(path, shape), path.areas / path.areas[-1]
    np.testing.assert_allclose(columns[:, 0], 0.0, atol=1e-12)  # the rate never leaves its first value
    np.testing.assert_allclose(columns[:, 1], 0.5 * (1 - np.exp(-2.0 * reach)))
    np.testing.assert_allclose(columns[:, 2], np.log1p(0.5 * reach / 0.5))


def test_annealing_follows_the_rate_with_a_delay():
    path = path_of_plan(build_plan(parse(law_config(qa_blend(0.25), steps=400)), {}).to_dict())
    slow, fast = (terms(path, LawShape(path.areas[-1], 1e-3, a, 2.0, 1.0, 1.0))[:, 0] for a in (4.0, 400.0))
    assert -0.99 <= fast[-1] < slow[-1] < 0
    middle = len(path.steps) // 2
    np.testing.assert_allclose(fast[middle], path.rates[middle] / 1e-3 - 1, atol=0.02)


def test_jackknife_variance_of_a_mean():
    values = np.array([1.0, 4.0, 2.0, 7.0])
    means = np.array([np.delete(values, index).mean() for index in range(4)])
    assert jackknife_variance(means) == pytest.approx(values.var(ddof=1) / 4)


@pytest.mark.parametrize(("freedom", "expected"), [(3, 2.3534), (5, 2.0150), (9, 1.8331), (30, 1.6973)])
def test_quantiles_of_student_t(freedom, expected):
    assert quantile(CONFIDENCE, freedom) == pytest.approx(expected, rel=0.005)
