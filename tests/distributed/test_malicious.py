"""Pickles that execute code, in every file of a checkpoint that is unpickled, are refused and not executed."""

from __future__ import annotations

import io
import pickle
import shutil
from pathlib import Path

import pytest
import torch

from megatron_cpt.checkpoint.manifest import digest, manifest_text
from megatron_cpt.checkpoint.torchfile.unpickle import read_metadata
from tests.helpers.ranks import RankError, run_ranks
from tests.helpers.runs import newest, train_here


class Bomb:
    """Object that creates a file when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[object, tuple[str, str]]:
        return (open, (str(self.mark), "w"))


def _saved(obj: object) -> bytes:
    file = io.BytesIO()
    torch.save(obj, file)
    return file.getvalue()


def _write_metadata(checkpoint: Path, bomb: Bomb) -> None:
    (checkpoint / ".metadata").write_bytes(pickle.dumps(bomb))


def _write_common(checkpoint: Path, bomb: Bomb) -> None:
    (checkpoint / "common.pt").write_bytes(_saved({"optimizer": bomb}))


def _write_shards(checkpoint: Path, bomb: Bomb) -> None:
    """Write the bomb over every entry that is long enough to hold it."""
    entries = read_metadata(checkpoint).storage_data.values()
    content = _saved(bomb)
    for entry in entries:
        if entry.length >= len(content):
            with open(checkpoint / entry.relative_path, "r+b") as file:
                file.seek(entry.offset)
                file.write(content.ljust(entry.length, b"\0"))


@pytest.mark.parametrize("arm", [_write_metadata, _write_common, _write_shards])
def test_a_pickle_bomb_is_refused_and_does_not_go_off(run_file: Path, base: Path, tmp_path: Path, arm) -> None:
    trap, mark = tmp_path / "trap", tmp_path / "it-went-off"
    shutil.copytree(newest(base), trap)
    arm(trap, Bomb(mark))
    names = [path.name for path in trap.iterdir() if path.name != "manifest.json"]
    (trap / "manifest.json").write_text(manifest_text({name: digest(trap / name) for name in names}))
    with pytest.raises(RankError, match="RefusedError"):
        run_ranks(
            1, train_here, str(run_file), [f"init.from={trap}", f"output={tmp_path}/out", "init.load=weights+optimizer"]
        )
    assert not mark.exists()
    assert not (tmp_path / "out" / "checkpoints").exists()


def test_the_bomb_is_live(tmp_path: Path) -> None:
    pickle.loads(pickle.dumps(Bomb(tmp_path / "mark")))  # noqa: S301 - that it does harm is the point
    assert (tmp_path / "mark").exists()
