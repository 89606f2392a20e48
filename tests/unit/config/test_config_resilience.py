"""Section `resilience` and durations."""

from __future__ import annotations

import pytest

from megatron_cpt.config import draft_config, format_duration
from megatron_cpt.config.quantities import parse_duration


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("3h50m", 13800.0),
        ("1d12h", 129600.0),
        ("90s", 90.0),
        ("1.5s", 1.5),
        ("2d1h1m1s", 176461.0),
        (90, 90.0),
        (0.25, 0.25),
        (" 5m ", 300.0),
    ],
)
def test_durations(text, seconds):
    assert parse_duration(text) == seconds
    assert parse_duration(format_duration(seconds)) == seconds


@pytest.mark.parametrize("text", ["", "3", "m", "50m3h", "1h1h", "-5m", "1.5h", "3 h", True, None, [3], "1e3s"])
def test_invalid_durations(text):
    with pytest.raises(ValueError, match="not a time"):
        parse_duration(text)


@pytest.mark.parametrize("value", [0, "0s", -1, float("nan")])
def test_a_duration_is_above_0(value):
    with pytest.raises(ValueError, match="above 0"):
        parse_duration(value)


@pytest.mark.parametrize("value", ["3651d", 1e12, 1e300])
def test_a_duration_fits_into_timers(value):
    with pytest.raises(ValueError, match="longer than 10 years"):
        parse_duration(value)


def test_the_defaults_watch_but_change_nothing(run_data):
    config = draft_config(run_data).config.resilience
    assert (config.wall_time, config.hang_timeout, config.peer_timeout) == (None, 1800.0, 120.0)
    assert (config.stop_after, config.parameter_hash_every, config.straggler) == (5, None, False)
    assert (config.spike.action, config.spike.sigma, config.spike.window, config.spike.num_needed) == (
        "warn", 6.0, 128, 64,
    )  # fmt: skip


def test_off_without_quotes_is_not_false(run_data):
    assert draft_config(run_data, ["resilience.spike.action=off"]).config.resilience.spike.action == "off"


def test_every_problem_has_its_key(run_data):
    wrong = ["wall_time=3x", "hang_timeout=-1", "stop_after=0", "spike.sigma=0", "spike.window=3", "spike.warmup=1",
             "parameter_hash_every=0", "straggler=maybe", "spike.action=panic"]  # fmt: skip
    problems = draft_config(run_data, [f"resilience.{change}" for change in wrong]).problems
    for change in wrong:
        assert any(problem.startswith(f"resilience.{change.partition('=')[0]}: ") for problem in problems), change


def test_a_warmup_beyond_the_window_is_named(run_data):
    (problem,) = draft_config(run_data, ["resilience.spike={window: 8, warmup: 9}"]).problems
    assert problem.startswith("resilience.spike.warmup: 9")
