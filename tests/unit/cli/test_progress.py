"""Progress of long commands where stderr is no terminal."""

from __future__ import annotations

import time

import pytest

from megatron_cpt.cli.progress import progress_bar


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    return now


def test_a_log_has_a_line_per_minute_with_the_time_left(clock: list[float], capfd: pytest.CaptureFixture[str]) -> None:
    with progress_bar("evaluating") as advance:
        for seconds, amount in ((1, 0), (30, 50), (30, 50), (59, 300), (1, 0), (60, 0)):
            clock[0] += seconds
            advance(amount, 1000)
    assert capfd.readouterr().err.splitlines() == [
        "evaluating: 100 of 1,000 (10%), 9m9s left",
        "evaluating: 400 of 1,000 (40%), 2m left",
        "evaluating: 400 of 1,000 (40%)",
    ]


def test_bytes_are_shown_as_such_and_an_unknown_total_is_silent(
    clock: list[float], capfd: pytest.CaptureFixture[str]
) -> None:
    with progress_bar("copying", is_bytes=True) as advance:
        clock[0] += 60
        advance(3_000_000)
        advance(0, 12_000_000)
    assert capfd.readouterr().err.splitlines() == ["copying: 3 of 12 MB (25%), 3m left"]
