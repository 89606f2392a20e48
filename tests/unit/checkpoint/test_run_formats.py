"""Every format that this project has written is read; see tests/fixtures/make_run_directories.py."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_cpt.checkpoint import layout
from megatron_cpt.checkpoint.layout import NewerFormatError
from megatron_cpt.checkpoint.manifest import digest, find_faults, manifest_text, read_manifest
from megatron_cpt.checkpoint.record import read_saved_run, read_state
from megatron_cpt.errors import RefusedError
from megatron_cpt.files.checksum import Checksum
from megatron_cpt.provenance.plans_file import StartedRun, read_started_run
from megatron_cpt.provenance.trace import trace_step
from tests.fixtures.make_run_directories import COMMITS
from tests.helpers.faults import flip_bit
from tests.helpers.formats import unpack

RUNS = [name for name in COMMITS if name.startswith("run")]


def checkpoint_of(run: Path) -> Path:
    return layout.resolve_checkpoint(run)


@pytest.mark.parametrize("name", COMMITS)
def test_a_checkpoint_of_every_format_is_valid_and_damage_to_any_file_of_it_is_found(name: str, tmp_path: Path) -> None:
    checkpoint = checkpoint_of(unpack(name, tmp_path))
    assert find_faults(checkpoint) == []
    saved = read_saved_run(checkpoint)
    assert saved.run["name"] in ("old", "run")
    version = saved.state["format_version"]
    assert f"_{version}" in name
    for file in saved.manifest:
        flip_bit(checkpoint / file, 8 * 40)
        assert find_faults(checkpoint) == [f"{file}: checksum differs: the content is damaged"]
        flip_bit(checkpoint / file, 8 * 40)


@pytest.mark.parametrize("name", RUNS)
def test_a_run_directory_is_traced_since_it_has_plans(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = unpack(name, tmp_path)
    monkeypatch.chdir(tmp_path)
    if (run / "plans.jsonl").exists():
        assert [(sample.source, sample.sample_index) for sample in trace_step(run, 2).samples] == [
            ("web", 2),
            ("web", 3),
        ]
    else:
        with pytest.raises(RefusedError, match=r"plans\.jsonl: missing"):
            trace_step(run, 2)


def test_a_run_knows_its_id_since_format_2(tmp_path: Path) -> None:
    for name in RUNS:
        run = unpack(name, tmp_path / name)
        started, saved = read_started_run(run), read_saved_run(checkpoint_of(run))
        if name in ("run_1_first", "run_1_rate"):
            assert started is None
        elif "_1_" in name:
            assert started == StartedRun(None, has_saved=True)
        else:
            assert started is not None
            assert started.run_id == saved.run_id is not None
            assert started.has_saved
        assert (saved.run_id is None) == ("_1_" in name)


def test_a_changed_format_has_a_higher_version(tmp_path: Path) -> None:
    """If it fails, raise FORMAT_VERSION, add a fixture, and describe the version in docs/operations/checkpoints.md."""
    newest = unpack(f"run_{layout.FORMAT_VERSION}", tmp_path)
    state = set(read_state(checkpoint_of(newest)))
    assert state == {
        *("format_version", "run_id", "train", "layout", "next_rate", "data_fingerprints", "tokenizer_fingerprint"),
        *("eod_id", "layer_spec", "versions"),
    }
    written = json.loads(manifest_text({}))
    assert written.keys() == json.loads((checkpoint_of(newest) / "manifest.json").read_text()).keys()
    assert written["format_version"] == layout.FORMAT_VERSION
    lines = [json.loads(line) for line in (newest / "plans.jsonl").read_text().splitlines()]
    assert [set(line) for line in lines] == [
        {"after_step", "state", "run_id", "run", "plan", "data_fingerprints", "has_saved"}
    ]


def test_a_newer_format_is_refused_with_what_to_do_and_not_called_damaged(tmp_path: Path) -> None:
    checkpoint = checkpoint_of(unpack("run_2", tmp_path))
    plain = json.loads((checkpoint / "manifest.json").read_text())
    del plain["checksum"]
    plain |= {"format_version": 3, "algorithm": "of the future"}
    own = Checksum(json.dumps(plain, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
    (checkpoint / "manifest.json").write_text(json.dumps({**plain, "checksum": own}))
    with pytest.raises(
        NewerFormatError, match=r"manifest\.json: format version 3, this software reads up to 2; update it"
    ):
        read_manifest(checkpoint)
    (checkpoint / "manifest.json").write_text(json.dumps({**plain, "checksum": own[::-1]}))
    with pytest.raises(RefusedError, match="its own checksum differs") as caught:
        read_manifest(checkpoint)
    assert not isinstance(caught.value, NewerFormatError)


@pytest.mark.parametrize("name", COMMITS)
def test_an_entry_removed_from_a_manifest_is_found(name: str, tmp_path: Path) -> None:
    """In format 1 the file that is left without its entry shows it; since format 2 the manifest itself does."""
    checkpoint = checkpoint_of(unpack(name, tmp_path))
    manifest = checkpoint / "manifest.json"
    sound = json.loads(manifest.read_text())
    for file in sound["files"]:
        if "/" in file:
            continue  # hf/: tokenizer and config of an import, which no load of weights reads
        manifest.write_text(json.dumps({**sound, "files": {k: v for k, v in sound["files"].items() if k != file}}))
        with pytest.raises(RefusedError, match=r"no entry for|its own checksum differs"):
            find_faults(checkpoint)
    for files in ({}, {"state.json": sound["files"]["state.json"]}):
        manifest.write_text(json.dumps({**sound, "files": files}))
        with pytest.raises(RefusedError, match=r"no entry for|its own checksum differs"):
            find_faults(checkpoint)


def test_a_file_removed_with_its_entry_is_found(tmp_path: Path) -> None:
    checkpoint = checkpoint_of(unpack("run_2", tmp_path))
    for file in sorted(read_manifest(checkpoint)):
        manifest, content = (checkpoint / "manifest.json").read_text(), (checkpoint / file).read_bytes()
        plain = json.loads(manifest)
        del plain["files"][file]
        (checkpoint / "manifest.json").write_text(json.dumps(plain))
        (checkpoint / file).unlink()
        with pytest.raises(RefusedError, match=r"no entry for|its own checksum differs"):
            find_faults(checkpoint)
        (checkpoint / file).write_bytes(content)
        (checkpoint / "manifest.json").write_text(manifest)


def test_a_shard_that_the_manifest_does_not_list_is_found(tmp_path: Path) -> None:
    checkpoint = checkpoint_of(unpack("run_2", tmp_path))
    for name in ("notes.txt", ".nfs0001"):
        (checkpoint / name).write_text("of a user, or of a file system")
    assert find_faults(checkpoint) == []
    (checkpoint / "__7_0.distcp").write_bytes(b"of another checkpoint")
    with pytest.raises(RefusedError, match=r"no entry for __7_0\.distcp"):
        find_faults(checkpoint)


def test_a_manifest_without_shards_is_none(tmp_path: Path) -> None:
    for name in ("state.json", "run.yaml", ".metadata", "metadata.json"):
        (tmp_path / name).write_text("{}")
    (tmp_path / "manifest.json").write_text(manifest_text({path.name: digest(path) for path in tmp_path.iterdir()}))
    with pytest.raises(RefusedError, match="no entry for any shard"):
        read_manifest(tmp_path)
    (tmp_path / "manifest.json").write_text('{"algorithm": "xxh3_128", "files": {}}')
    with pytest.raises(RefusedError, match=r"no entry for state\.json, run\.yaml"):
        read_manifest(tmp_path)
