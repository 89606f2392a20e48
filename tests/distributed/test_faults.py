"""What a run does when its numbers break."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.helpers.ranks import RankError, run_ranks
from tests.helpers.runs import newest, read_metrics, train_here


def test_a_loss_that_is_not_a_number_ends_the_run_and_is_never_saved(run_file: Path) -> None:
    output = run_file.parent / "diverged"
    # the first steps are sound; at this rate the weights overflow soon after
    wild = [f"output={output}", "schedule.max_lr=1e30", "schedule.warmup=2", "optimizer.clip_grad=0", "log.every=100"]
    with pytest.raises(RankError, match="the loss is nan"):
        run_ranks(1, train_here, str(run_file), [*wild, "checkpoint.every=1"])
    saved = int(newest(output).name.removeprefix("step-"))
    lines = {line["step"]: line["loss"] for line in read_metrics(output)}
    assert lines[saved] is not None
    assert lines[saved + 1] is None, "JSON has no nan"
