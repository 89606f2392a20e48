"""Training run whose source is read through a disk cache that both ranks share."""

from __future__ import annotations

from pathlib import Path

from tests.helpers.ranks import run_ranks
from tests.helpers.runs import read_metrics, train_several


def train_with_space(path: str, runs: list[list[str]]) -> list[int]:
    """Train as if the disk were nearly empty; the cache leaves a tenth of it free."""
    from megatron_cpt.data.tokenfile import disk_cache

    disk_cache._LEAST_FREE = 0.0
    return train_several(path, runs)


def test_the_cache_changes_nothing_but_where_tokens_are_read(run_file: Path) -> None:
    folder = run_file.parent / "data-cache"
    cached = [f"sources.web.cache={folder}/blocks", f"sources.code.cache={folder}/blocks"]
    starts = [[f"output={folder}/plain"], [f"output={folder}/cached", *cached]]
    runs = [[*start, "stop_at_step=4"] for start in starts]
    assert run_ranks(2, train_with_space, str(run_file), runs) == [[0, 0]] * 2
    losses = [[line["loss"] for line in read_metrics(folder / name)] for name in ("plain", "cached")]
    assert losses[0] == losses[1]
    assert len(losses[0]) == 4
    assert len(list((folder / "blocks").glob("*.blocks"))) == 2
