"""Copies of checkpoints that are not what was saved: interrupted, or mixed from two checkpoints."""

from __future__ import annotations

import itertools
import shutil
from pathlib import Path

import pytest

from megatron_cpt.checkpoint.layout import resolve_checkpoint
from megatron_cpt.checkpoint.manifest import find_faults, read_manifest
from megatron_cpt.errors import RefusedError
from tests.helpers.formats import unpack


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Return checkpoints of one step of two runs of one model."""
    first, second = (unpack(name, tmp_path_factory.mktemp(name)) for name in ("run_2", "run_1_xxh3"))
    return resolve_checkpoint(first), resolve_checkpoint(second)


def is_valid(checkpoint: Path) -> bool:
    try:
        return find_faults(checkpoint) == []
    except RefusedError:
        return False


@pytest.mark.parametrize("half", [None, ".half.Xy12Zq", "half"], ids=["between", "rsync", "rsync --inplace, cp"])
def test_an_interrupted_copy_is_never_valid(checkpoints: tuple[Path, Path], half: str | None, tmp_path: Path) -> None:
    """In the order of rsync and in the reverse order; the next file is not begun, hidden under a name, or cut."""
    source = checkpoints[0]
    names = sorted(path.name for path in source.iterdir())
    for number, order in itertools.product(range(len(names)), (names, names[::-1])):
        copy = tmp_path / "copy" / source.name
        copy.mkdir(parents=True)
        for name in order[:number]:
            shutil.copy(source / name, copy)
        if half is not None:
            content = (source / order[number]).read_bytes()
            (copy / half.replace("half", order[number])).write_bytes(content[: len(content) // 2])
        assert not is_valid(copy), (number, order)
        shutil.rmtree(copy.parent)
    shutil.copytree(source, tmp_path / "copy" / source.name)
    (tmp_path / "copy" / source.name / ".__0_0.distcp.Xy12Zq").write_bytes(b"left by an earlier rsync")
    assert is_valid(tmp_path / "copy" / source.name)


def test_files_mixed_from_two_checkpoints_are_never_valid(checkpoints: tuple[Path, Path], tmp_path: Path) -> None:
    """Every subset of the files that differ: only all of one checkpoint are valid."""
    own, other = checkpoints
    assert read_manifest(own).keys() == read_manifest(other).keys()
    names = [name.name for name in own.iterdir() if name.read_bytes() != (other / name.name).read_bytes()]
    assert {"manifest.json", "state.json", "__0_0.distcp", ".metadata"} <= set(names)
    mixed = shutil.copytree(own, tmp_path / "mixed")
    for choice in itertools.product((own, other), repeat=len(names)):
        for name, source in zip(names, choice, strict=True):
            shutil.copy(source / name, mixed)
        assert is_valid(mixed) == (len(set(choice)) == 1), choice
