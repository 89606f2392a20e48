"""Checksums compared while reading: no file is used before it is verified."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from megatron_cpt.checkpoint.manifest import digest, manifest_text
from megatron_cpt.convert.source import verify_before_read
from megatron_cpt.errors import RefusedError

SHARDS = [f"__0_{number}.distcp" for number in range(12)]


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    names = [*SHARDS, "common.pt", ".metadata", "metadata.json", "run.yaml", "state.json"]
    for number, name in enumerate(names):
        (tmp_path / name).write_bytes(bytes([number]) * 1000)
    files = {name: digest(tmp_path / name) for name in names}
    (tmp_path / "manifest.json").write_text(manifest_text(files))
    return tmp_path


def damage(file: Path) -> None:
    file.write_bytes(b"x" * file.stat().st_size)


def test_damage_is_found_in_its_file_and_immediately_in_small_files(checkpoint: Path) -> None:
    damage(checkpoint / "__0_10.distcp")
    before_read = verify_before_read(checkpoint, "full")
    with ThreadPoolExecutor(4) as threads:
        list(threads.map(before_read, [checkpoint / name for name in SHARDS if name != "__0_10.distcp"] * 3))
    for _ in range(2):
        with pytest.raises(RefusedError, match=r"__0_10\.distcp: checksum differs.*use another checkpoint"):
            before_read(checkpoint / "__0_10.distcp")
    damage(checkpoint / "common.pt")
    with pytest.raises(RefusedError, match=r"common\.pt: checksum differs"):
        verify_before_read(checkpoint, "full")


def test_a_missing_file_is_reported_before_anything_is_read(checkpoint: Path) -> None:
    (checkpoint / "__0_3.distcp").unlink()
    (checkpoint / "__0_4.distcp").write_bytes(b"short")
    with pytest.raises(RefusedError, match=r"__0_3\.distcp: missing; __0_4\.distcp: 5 bytes, should be 1000"):
        verify_before_read(checkpoint, "full")


def test_a_sample_is_one_shard_in_sixteen(checkpoint: Path) -> None:
    for name in SHARDS:
        damage(checkpoint / name)
    before_read = verify_before_read(checkpoint, "sampled")
    refused = []
    for name in SHARDS:
        try:
            before_read(checkpoint / name)
        except RefusedError:
            refused.append(name)
    assert len(refused) == 1
