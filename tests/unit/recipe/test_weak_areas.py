"""Weak areas: factors from accuracies, and files or tasks that have none."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_cpt.errors import RefusedError, UserError
from megatron_cpt.recipe.weak_areas import find_weak_areas

RESULTS = {
    "stem": {"alias": "stem", "acc,none": 0.25, "acc_stderr,none": 0.01, "acc_norm,none": 0.30},
    "math": {"exact_match": 0.5},
    "chat": {"acc": 0.60, "acc_stderr": 0.01},
    "perfect": {"acc": 1.0},
    "text": {"bits_per_byte": 0.9},
}


@pytest.fixture
def results(tmp_path: Path) -> Path:
    path = tmp_path / "results.json"
    path.write_text(json.dumps({"results": RESULTS}))
    return path


def test_the_factor_is_the_error_over_the_mean_error(results: Path) -> None:
    areas = find_weak_areas(results, {"qa_stem": ["stem", "math"], "qa_chat": ["chat"]})
    assert areas["qa_stem"].accuracies == {"stem": 0.30, "math": 0.5}
    assert areas["qa_stem"].error == pytest.approx(0.6)
    assert areas["qa_stem"].factor == pytest.approx(0.6 / 0.5)
    assert areas["qa_chat"].factor == pytest.approx(0.4 / 0.5)


def test_a_perfect_score_removes_no_source(results: Path) -> None:
    areas = find_weak_areas(results, {"qa_stem": ["stem"], "qa_easy": ["perfect"]})
    assert areas["qa_easy"].factor == pytest.approx(0.01 / 0.355)


@pytest.mark.parametrize(
    ("task", "message"), [("mmlu", "not among the results"), ("text", "has no accuracy of it .* only bits_per_byte")]
)
def test_tasks_without_an_accuracy(results: Path, task: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        find_weak_areas(results, {"qa": [task]})


def test_files_that_are_no_results(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file"):
        find_weak_areas(tmp_path / "absent.json", {"qa": ["stem"]})
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(RefusedError, match="has no results"):
        find_weak_areas(tmp_path / "other.json", {"qa": ["stem"]})
