"""What lies on the disk is not what was written: flipped, cut, lost, spoilt or made by somebody else."""

from __future__ import annotations

import logging
import os
import pickle
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_cpt.checkpoint.layout import LATEST_FILE, checkpoints_folder
from megatron_cpt.checkpoint.manifest import FileDigest, manifest_text, read_manifest
from megatron_cpt.checkpoint.unpickle import load_plain
from megatron_cpt.errors import RefusedError
from tests.helpers.faults import cut, flip_bit, seal_again
from tests.helpers.ranks import RankError, run_ranks
from tests.helpers.runs import newest, small_run, train_here, write_source

SMALL = {"preset": "tiny_llama", "layers": 2, "hidden": 64, "ffn_hidden": 96, "vocab": 257}
SEED = 20


@pytest.fixture(scope="module")
def two_saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run directory with the checkpoints of steps 2 and 4, written by two ranks."""
    folder = tmp_path_factory.mktemp("files")
    run = small_run(folder, model=SMALL, checkpoint={"every": 2}, parallel={"tensor": 2}, stop_at_step=4)
    run_ranks(2, train_here, str(run))
    return folder / "out"


def look_for_newest(outputs: list[str]) -> list[tuple[str | None, list[str]]]:
    """Of each run directory, on every rank: the checkpoint that a resume takes or the refusal, and the warnings."""
    from megatron_cpt.checkpoint.load import newest_sound

    logger, answers = logging.getLogger("megatron_cpt"), []
    logger.setLevel(logging.WARNING)
    for output in outputs:
        messages: list[str] = []
        handler = logging.Handler()
        handler.emit = lambda record, heard=messages: heard.append(record.getMessage())  # type: ignore[method-assign]
        logger.addHandler(handler)
        try:
            found = newest_sound(checkpoints_folder(output))
            answers.append((found.name if found else None, messages))
        except RefusedError as error:
            answers.append((f"refused: {error}", messages))
        logger.removeHandler(handler)
    return answers


def _flip_first(path: Path) -> None:
    flip_bit(path, 0)


def _flip_last(path: Path) -> None:
    flip_bit(path, 8 * path.stat().st_size - 1)


def _flip_some(path: Path) -> None:
    flip_bit(path, random.Random(f"{SEED} {path.name}").randrange(8 * path.stat().st_size))


def _cut_in_half(path: Path) -> None:
    cut(path, path.stat().st_size // 2)


def _cut_one_byte(path: Path) -> None:
    cut(path, path.stat().st_size - 1)


def _empty(path: Path) -> None:
    cut(path, 0)


def _replace_by_a_link(path: Path) -> None:
    elsewhere = path.parents[2] / f"elsewhere-{path.name}"
    path.rename(elsewhere)
    path.symlink_to(elsewhere)


HARMS: list[Callable[[Path], None]] = [
    _flip_first,
    _flip_last,
    _flip_some,
    _cut_in_half,
    _cut_one_byte,
    _empty,
    Path.unlink,
    _replace_by_a_link,
]


def test_harm_to_any_file_is_found_and_named_and_the_checkpoint_before_is_used(two_saved: Path, tmp_path: Path) -> None:
    cases = []
    for file in sorted(path.name for path in newest(two_saved).iterdir()):
        for harm in HARMS:
            output = tmp_path / f"{harm.__name__}-{file}"
            shutil.copytree(two_saved, output)
            harm(newest(output) / file)
            cases.append((output, file))
    names = {file for _, file in cases}
    assert {".metadata", "manifest.json", "state.json", "run.yaml", "plan.json"} <= names
    assert len([name for name in names if name.startswith("__0_")]) >= 1
    assert len([name for name in names if name.startswith("__1_")]) >= 1

    on_each_rank = run_ranks(2, look_for_newest, [str(output) for output, _ in cases])
    for (output, file), (found, warnings), (found_by_other, _) in zip(cases, *on_each_rank, strict=True):
        assert found == found_by_other == "step-00000002", (output.name, found)
        (warning,) = warnings
        assert "step-00000004 is broken and passed over" in warning
        assert file in warning, (output.name, warning)


def test_every_bit_of_a_manifest_counts(tmp_path: Path) -> None:
    """Flipped, each gives a manifest that is refused or one that the files do not fit."""
    text = manifest_text({".metadata": FileDigest(60, "0f" * 32), "__0_0.distcp": FileDigest(129, "a9" * 32)}).encode()
    (tmp_path / "manifest.json").write_bytes(text)
    sound, missed = read_manifest(tmp_path), []
    for bit in range(8 * len(text)):
        flipped = bytearray(text)
        flipped[bit // 8] ^= 1 << bit % 8
        (tmp_path / "manifest.json").write_bytes(flipped)
        try:
            if read_manifest(tmp_path) == sound:
                missed.append(bytes(flipped))
        except RefusedError:
            continue
    assert missed == []


@pytest.mark.parametrize(
    "content", [b"", b"\x00\xff\x80garbage", b"step-99999999\n", b"step-00000002\n", b"../../etc\n", None]
)
def test_a_run_goes_on_whatever_latest_says_and_puts_it_right(
    two_saved: Path, tmp_path: Path, content: bytes | None
) -> None:
    output = tmp_path / "out"
    shutil.copytree(two_saved, output)
    latest = checkpoints_folder(output) / LATEST_FILE
    latest.unlink()
    if content is not None:
        latest.write_bytes(content)
    assert run_ranks(2, look_for_newest, [str(output)])[0] == [("step-00000004", [])]
    run_ranks(2, train_here, str(two_saved.parent / "run.yaml"), [f"output={output}", "stop_at_step=5"])
    assert latest.read_text() == "step-00000005\n"


def test_a_run_whose_checkpoints_are_gone_does_not_start_over(two_saved: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    shutil.copytree(two_saved, output)
    for checkpoint in checkpoints_folder(output).glob("step-*"):
        shutil.rmtree(checkpoint)
    with pytest.raises(RankError, match=r"RefusedError: .*latest names step-00000004.*no checkpoint"):
        run_ranks(2, train_here, str(two_saved.parent / "run.yaml"), [f"output={output}", "stop_at_step=5"])
    assert not list(checkpoints_folder(output).glob("step-*"))


def test_another_file_of_data_is_refused_and_named_and_the_same_one_elsewhere_is_not(
    two_saved: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    shutil.copytree(two_saved, output)
    write_source(tmp_path / "other", stride=1, seed=1)
    write_source(tmp_path / "same", stride=1)
    run, overrides = str(two_saved.parent / "run.yaml"), [f"output={output}", "stop_at_step=5"]
    with pytest.raises(RankError, match=r"RefusedError: [\s\S]*- data: the files of web are not those"):
        run_ranks(2, train_here, run, [*overrides, f"sources.web.path={tmp_path / 'other'}"])
    assert newest(output).name == "step-00000004"
    run_ranks(2, train_here, run, [*overrides, f"sources.web.path={tmp_path / 'same'}"])
    assert newest(output).name == "step-00000005"


def test_files_and_chunks_of_a_source_are_remembered_while_it_is_away(tmp_path: Path) -> None:
    run, data = str(small_run(tmp_path)), tmp_path / "data"
    web_only = [f"sources={{web: {{path: {data}/web}}}}", "phases=[{name: web, blend: {web: 1.0}}]"]
    run_ranks(1, train_here, run, ["stop_at_step=2"])
    run_ranks(1, train_here, run, ["stop_at_step=4", *web_only], ["blend", "schedule"])
    write_source(tmp_path / "other", stride=2, seed=1)
    with pytest.raises(RankError, match=r"RefusedError: [\s\S]*- data: the files of code are not those"):
        run_ranks(1, train_here, run, [f"sources.code.path={tmp_path / 'other'}"], ["blend", "schedule"])
    longer = (
        "phases=[{name: web, blend: {web: 1.0}, until: {step: 6}}, {name: code, blend: {code: 1.0}, seq_length: 64}]"
    )
    with pytest.raises(RankError, match=r"RefusedError: data state: .* once it was read: code 32 -> 64 tokens"):
        run_ranks(1, train_here, run, [longer], ["blend", "schedule", "phase_length"])
    run_ranks(1, train_here, run, ["stop_at_step=5"], ["blend", "schedule"])
    assert newest(tmp_path / "out").name == "step-00000005"


def test_a_path_that_climbs_out_of_the_folder_is_refused(two_saved: Path, tmp_path: Path) -> None:
    """In the manifest, and in torch's description of where the tensors lie."""
    in_manifest, in_metadata = tmp_path / "manifest", tmp_path / "metadata"
    for output in (in_manifest, in_metadata):
        shutil.copytree(two_saved, output)
    manifest = newest(in_manifest) / "manifest.json"
    shutil.copy(newest(in_manifest) / "plan.json", newest(in_manifest).parent / "plan.json")
    manifest.write_text(manifest.read_text().replace('"plan.json"', '"../plan.json"'))
    ((_, (warning,)),) = run_ranks(1, look_for_newest, [str(in_manifest)])[0]
    assert "../plan.json: not a file of this folder" in warning

    checkpoint = newest(in_metadata)
    with open(checkpoint / ".metadata", "rb") as file:
        metadata = load_plain(file)
    for entry in metadata.storage_data.values():
        shutil.copy(checkpoint / entry.relative_path, tmp_path / entry.relative_path)
        entry.relative_path = os.path.relpath(tmp_path / entry.relative_path, checkpoint)
    (checkpoint / ".metadata").write_bytes(pickle.dumps(metadata))
    seal_again(checkpoint)
    with pytest.raises(RankError, match=r"RefusedError: .*\.\./.*outside"):
        run_ranks(2, train_here, str(two_saved.parent / "run.yaml"), [f"output={in_metadata}", "stop_at_step=5"])


def look_with_an_odd_rank(output: str, trouble: str) -> list[tuple[str | None, list[str]]]:
    """As `look_for_newest`; rank 1 cannot read a file of the newest checkpoint, or does not see any checkpoint yet."""
    import torch.distributed as dist

    from megatron_cpt.checkpoint import layout, manifest

    measure = manifest.digest

    def digest(path: Path) -> FileDigest:
        if path.parent.name == "step-00000004":
            raise OSError(5, "Input/output error", str(path))
        return measure(path)

    with pytest.MonkeyPatch.context() as patch:
        if dist.get_rank() == 1 and trouble == "bad block":
            patch.setattr(manifest, "digest", digest)
        if dist.get_rank() == 1 and trouble == "late":
            patch.setattr(layout, "list_checkpoints", lambda folder: [])
        return look_for_newest([output])


def test_all_ranks_take_the_same_checkpoint_whatever_one_of_them_sees(two_saved: Path) -> None:
    for found, warnings in (rank[0] for rank in run_ranks(2, look_with_an_odd_rank, str(two_saved), "bad block")):
        assert found == "step-00000002"
        assert all("Input/output error" in warning for warning in warnings)
    seen = run_ranks(2, look_with_an_odd_rank, str(two_saved), "late")
    assert seen == [[("step-00000004", [])]] * 2
