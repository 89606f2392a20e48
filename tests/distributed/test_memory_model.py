"""The planner's memory model against what real runs allocate; `benchmarks/memory_model.py` has many more layouts."""

from __future__ import annotations

import pytest

from benchmarks.memory_model import CASES, measured_rows

LAYOUTS = {
    1: ["fp32", "full recomputation"],
    2: ["TP2, sequence parallel, gated", "PP2", "PP2 VPP2, unequal chunks", "DP2, distributed optimizer"],
    4: ["TP2 PP2, sequence parallel"],
}


@pytest.mark.parametrize("num_ranks", [1, pytest.param(2, marks=pytest.mark.long), 4])
def test_every_part_is_within_a_tenth(num_ranks: int) -> None:
    assert set(LAYOUTS[num_ranks]) <= set(CASES[num_ranks])
    rows = measured_rows(num_ranks, LAYOUTS[num_ranks])
    assert {row["run"] for row in rows} == set(LAYOUTS[num_ranks])
    for row in rows:
        states = [row["error"][part] for part in ("weights", "gradients", "optimizer")]
        assert states == pytest.approx([0, 0, 0], abs=0.01), row["run"]
        assert abs(row["error"]["pass"]) < 0.1, (row["run"], row["stage"])
