"""Manifest, verification and text files of a checkpoint, on folders made by hand."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_cpt.checkpoint import layout
from megatron_cpt.checkpoint.loading import verify_while_reading
from megatron_cpt.checkpoint.loading.verify_while_reading import ShardVerifier, share_of
from megatron_cpt.checkpoint.manifest import (
    CorruptCheckpointError,
    FileDigest,
    Verify,
    digest,
    find_faults,
    manifest_text,
    sample,
    shards_to_compare,
)
from megatron_cpt.checkpoint.record import Record, read_json, read_run, read_saved_run, read_state
from megatron_cpt.errors import RefusedError

SMALL = (".metadata", "metadata.json", "run.yaml", "state.json")


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """Return a folder with 40 shards, the small files that every checkpoint has, and their manifest."""
    folder = tmp_path / "step-00000007"
    folder.mkdir()
    for rank in range(20):
        for number in range(2):
            (folder / f"__{rank}_{number}.distcp").write_bytes(bytes([rank, number]) * 500)
    for name in SMALL:
        (folder / name).write_text("{}")
    (folder / "manifest.json").write_text(manifest_text({path.name: digest(path) for path in folder.iterdir()}))
    return folder


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


def _shards(checkpoint: Path) -> list[str]:
    return sorted(path.name for path in checkpoint.glob("__*"))


def test_full_finds_a_flipped_bit_in_every_file(checkpoint: Path) -> None:
    for name in (*_shards(checkpoint), "state.json"):
        _flip(checkpoint / name)
        assert find_faults(checkpoint, how="full") == [f"{name}: checksum differs: the content is damaged"]
        _flip(checkpoint / name)
    assert find_faults(checkpoint) == []


def test_sampled_finds_it_in_its_sample_and_passes_over_the_rest_by_design(checkpoint: Path) -> None:
    found = []
    for name in (*_shards(checkpoint), "state.json"):
        _flip(checkpoint / name)
        if find_faults(checkpoint, how="sampled"):
            found.append(name)
        _flip(checkpoint / name)
    assert found[-1] == "state.json"
    assert len(found) == 3 + 1, "3 of 40 shards (one in 16), and every text file"
    assert {*found, *SMALL} == sample(checkpoint, [*_shards(checkpoint), *SMALL])


def test_another_checkpoint_is_judged_by_other_shards(checkpoint: Path) -> None:
    names = _shards(checkpoint)
    samples = [sample(checkpoint.with_name(layout.checkpoint_name(step)), names) for step in range(200)]
    assert len(set().union(*samples)) == 40
    assert samples == [sample(checkpoint.with_name(layout.checkpoint_name(step)), names) for step in range(200)]


def test_none_looks_at_names_and_sizes_only(checkpoint: Path) -> None:
    _flip(checkpoint / "__3_1.distcp")
    _flip(checkpoint / "state.json")
    assert find_faults(checkpoint, how="none") == []
    (checkpoint / "__5_0.distcp").write_bytes(b"cut")
    (checkpoint / "__6_0.distcp").unlink()
    expected = ["__5_0.distcp: 3 bytes, should be 1000", "__6_0.distcp: missing"]
    assert find_faults(checkpoint, how="none") == expected
    assert [fault for fault in find_faults(checkpoint, how="sampled") if "checksum" not in fault] == expected


def _shared_faults(checkpoint: Path, how: Verify, parts: int) -> list[list[str]]:
    """Return the faults that each of several ranks finds in its share of the shards."""
    found = []
    for part in range(parts):
        with _verifier(checkpoint, how, part, parts) as verifier:
            found.append(verifier.faults())
    return found


def _verifier(checkpoint: Path, how: Verify, part: int, parts: int) -> ShardVerifier:
    expected = shards_to_compare(checkpoint, how)
    return ShardVerifier(checkpoint, share_of(expected, part, parts))


@pytest.mark.parametrize("how", ["full", "sampled", "none"])
@pytest.mark.parametrize("parts", [1, 3, 20, 64])
def test_ranks_that_share_the_shards_find_what_one_finds(checkpoint: Path, how: Verify, parts: int) -> None:
    for name in (*_shards(checkpoint), "state.json"):
        _flip(checkpoint / name)
    shared = _shared_faults(checkpoint, how, parts)
    texts = find_faults(checkpoint, how, with_shards=False)
    assert texts == ([] if how == "none" else ["state.json: checksum differs: the content is damaged"])
    assert sorted([*texts, *(fault for part in shared for fault in part)]) == sorted(find_faults(checkpoint, how))
    if how == "full":
        assert max(map(len, shared)) - min(map(len, shared)) <= 1


def test_as_many_ranks_as_saved_hash_their_own_files(checkpoint: Path) -> None:
    for name in _shards(checkpoint):
        _flip(checkpoint / name)
    for rank, faults in enumerate(_shared_faults(checkpoint, "full", 20)):
        assert [fault.partition(":")[0] for fault in faults] == [f"__{rank}_0.distcp", f"__{rank}_1.distcp"]


def test_what_follows_the_hashing_waits_for_its_bytes_only(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The hashing of every file is blocked after 600 of 1000 bytes."""
    may_go_on = threading.Event()

    def compare_half(folder: Path, name: str, expected: FileDigest, progress: Callable[[int], None]) -> str | None:
        progress(600)
        may_go_on.wait()
        raise OSError(f"{name}: bad block")

    monkeypatch.setattr(verify_while_reading, "compare", compare_half)
    with _verifier(checkpoint, "full", 0, 20) as verifier:
        verifier.wait_for(checkpoint / "__0_0.distcp", 600)
        verifier.wait_for(checkpoint / "__1_0.distcp", 1000)  # hashed by another rank
        beyond = threading.Thread(target=verifier.wait_for, args=(checkpoint / "__0_0.distcp", 601))
        beyond.start()
        assert beyond.is_alive()
        may_go_on.set()
        beyond.join()  # nobody waits for a file that cannot be read
        assert verifier.faults() == ["__0_0.distcp: bad block", "__0_1.distcp: bad block"]


def test_on_demand_a_shard_is_hashed_when_it_is_read_and_two_more_ahead(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hashed: list[str] = []

    def compare(folder: Path, name: str, expected: FileDigest, progress: Callable[[int], None]) -> str | None:
        hashed.append(name)
        return f"{name}: damaged" if name == "__5_0.distcp" else None

    monkeypatch.setattr(verify_while_reading, "compare", compare)
    expected = shards_to_compare(checkpoint, "full")
    with ShardVerifier(checkpoint, expected, on_demand=True) as verifier:
        assert hashed == []
        verifier.verify(checkpoint / "__9_1.distcp")
        verifier.verify(checkpoint / "state.json")  # not a shard
        with pytest.raises(CorruptCheckpointError, match=r"corrupt: __5_0\.distcp: damaged"):
            verifier.verify(checkpoint / "__5_0.distcp")
    ahead = {"__9_1.distcp", "__10_0.distcp", "__10_1.distcp", "__5_0.distcp", "__5_1.distcp", "__6_0.distcp"}
    assert set(hashed) == ahead
    assert len(hashed) == 6


def test_a_saved_run_is_compared_with_its_manifest_and_read(checkpoint: Path) -> None:
    Record({"format_version": 2, "train": {"step": 7}}, "name: small\n", {}).write(checkpoint)
    files = [path for path in checkpoint.iterdir() if path.name != "manifest.json"]
    (checkpoint / "manifest.json").write_text(manifest_text({path.name: digest(path) for path in files}))
    saved = read_saved_run(checkpoint)
    assert (saved.path, saved.run, saved.state["train"]) == (checkpoint, {"name": "small"}, {"step": 7})
    assert set(saved.manifest) == {path.name for path in files}
    (checkpoint / "run.yaml").write_text("name: other\n")
    with pytest.raises(RefusedError, match=r"run\.yaml: missing, or different from what manifest\.json lists"):
        read_saved_run(checkpoint)
    assert read_saved_run(checkpoint, saved.manifest).run == {"name": "other"}, "verified by the caller"


def test_a_record_is_read_back(tmp_path: Path) -> None:
    record = Record({"format_version": 1, "train": {"step": 7}}, "name: small\nseed: 7\n", {"steps": 20})
    record.write(tmp_path)
    assert read_state(tmp_path) == record.state
    assert read_run(tmp_path) == {"name": "small", "seed": 7}
    assert read_json(tmp_path / "plan.json") == record.plan


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"format_version": 99}', "format version 99, this software reads up to 2; update it"),
        ('{"format_version": "new"}', "damaged: no format_version"),
        ("{}", "damaged: no format_version"),
        ("[1]", "damaged: not an object"),
        ('{"format_version": 1', "missing or damaged"),
    ],
)
def test_a_state_that_is_none_is_refused(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "state.json").write_text(content)
    with pytest.raises(RefusedError, match=message):
        read_state(tmp_path)


def test_a_missing_record_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RefusedError, match=r"plan\.json: missing or damaged"):
        read_json(tmp_path / "plan.json")
    with pytest.raises(RefusedError, match=r"x\.json"):
        read_json(tmp_path / "x.json")


def test_records_and_manifests_are_read_without_torch() -> None:
    modules = "megatron_cpt.checkpoint.record, megatron_cpt.checkpoint.manifest"
    code = f"import sys, {modules}; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_leftovers_are_told_from_checkpoints(tmp_path: Path) -> None:
    for name in ("step-00000002", "step-100000000", ".step-00000003.tmp", ".step-00000001.deleted", ".other.tmp", "x"):
        (tmp_path / name).mkdir()
    (tmp_path / "step-00000009").write_text("a file")
    assert [path.name for path in layout.list_checkpoints(tmp_path)] == ["step-00000002", "step-100000000"]
    assert [path.name for path in layout.list_leftovers(tmp_path)] == [".step-00000001.deleted", ".step-00000003.tmp"]
    assert layout.deleted_name(tmp_path / "step-00000001") == tmp_path / ".step-00000001.deleted"
