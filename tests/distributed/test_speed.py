"""Overlapped communication and fused losses over gloo: equal numbers, and saves and hashes that see all weights."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.helpers.checkpoints import differing
from tests.helpers.ranks import run_ranks
from tests.helpers.runs import newest, read_metrics, small_run, train_several

OVERLAP = ["speed={overlap_grad_reduce: true, overlap_param_gather: true}"]
FUSED_LOSS = "speed.fused_cross_entropy=true"
# With overlap the next forward pass gathers the update, but replicas are compared directly after it.
HASHED = ["resilience.parameter_hash_every=1"]


@pytest.fixture(scope="module")
def run_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_run(tmp_path_factory.mktemp("speed"), tokens=8 * 8 * 32)


def _train(path: Path, ranks: int, runs: dict[str, list[str]]) -> None:
    folder = path.parent
    arguments = [[*changes, f"output={folder / name}"] for name, changes in runs.items()]
    assert run_ranks(ranks, train_several, str(path), arguments) == [[0] * len(runs)] * ranks


def test_overlap_changes_nothing(run_file: Path) -> None:
    folder = run_file.parent
    _train(run_file, 2, {"plain": [], "overlapped": [*OVERLAP, *HASHED]})
    _train(run_file, 2, {"halves": [*OVERLAP, "stop_at_step=3"]})
    _train(run_file, 2, {"halves": OVERLAP})
    plain, overlapped, halves = (read_metrics(folder / name) for name in ("plain", "overlapped", "halves"))
    # a sum of two addends does not depend on their order
    assert [line["loss"] for line in overlapped] == [line["loss"] for line in plain]
    assert [line["grad_norm"] for line in overlapped] == pytest.approx([line["grad_norm"] for line in plain], rel=1e-6)
    assert [line["loss"] for line in halves] == [line["loss"] for line in overlapped]
    # the last save precedes the forward pass that would gather the last update
    assert differing(newest(folder / "plain"), newest(folder / "overlapped")) == []


@pytest.mark.parametrize(
    ("ranks", "changes"),
    [
        pytest.param(
            4, ["parallel.pipeline=2", "parallel.virtual_pipeline=2"], id="interleaved", marks=pytest.mark.long
        ),
        pytest.param(
            2,
            ["parallel.tensor=2", "parallel.sequence=true", "precision.compute=bf16", FUSED_LOSS],
            id="fused_loss_tp2",
        ),
    ],
)
def test_in_other_layouts(run_file: Path, ranks: int, changes: list[str]) -> None:
    name = f"ranks{ranks}"
    short = [*changes, "stop_at_step=6"]
    plain = [change for change in short if change != FUSED_LOSS]
    _train(run_file, ranks, {f"{name}-plain": plain, name: [*OVERLAP, *short]})
    losses = {key: [line["loss"] for line in read_metrics(run_file.parent / key)] for key in (f"{name}-plain", name)}
    assert losses[name] == pytest.approx(losses[f"{name}-plain"], rel=1e-6)
