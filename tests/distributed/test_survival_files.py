"""Files that differ from what was written: flipped, cut, lost, damaged or made by somebody else."""

from __future__ import annotations

import logging
import os
import pickle
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_cpt.backend import Ranks, process_groups
from megatron_cpt.checkpoint.layout import LATEST_FILE, checkpoints_folder
from megatron_cpt.checkpoint.manifest import FileDigest, manifest_text, read_manifest
from megatron_cpt.checkpoint.torchfile.unpickle import read_metadata
from megatron_cpt.errors import RefusedError
from megatron_cpt.prepare import PreparedRun, prepare_run
from tests.helpers.checkpoints import differing
from tests.helpers.faults import change_manifest, cut, flip_bit, seal_again
from tests.helpers.ranks import RankError, run_ranks
from tests.helpers.runs import newest, small_run, train_here, train_several, write_source

SMALL = {"preset": "tiny_llama", "layers": 2, "hidden": 64, "ffn_hidden": 96, "vocab": 257}
SEED = 20


@pytest.fixture(scope="module")
def two_saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a run directory with the checkpoints of steps 2 and 4, written by two ranks."""
    folder = tmp_path_factory.mktemp("files")
    run = small_run(folder, model=SMALL, checkpoint={"every": 2}, parallel={"tensor": 2}, stop_at_step=4)
    run_ranks(2, train_here, str(run))
    return folder / "out"


def set_up(run: str, outputs: list[str]) -> list[tuple[str | None, list[str]]]:
    """Return for each run directory the checkpoint that was loaded or the refusal, and the warnings."""
    prepared = prepare_run(run, need_files=True)
    with process_groups(prepared.config.parallel) as ranks:
        return [_set_up(prepared, ranks, output) for output in outputs]


def _set_up(prepared: PreparedRun, ranks: Ranks, output: str) -> tuple[str | None, list[str]]:
    from megatron_cpt.train.setup import setup

    logger = logging.getLogger("megatron_cpt")
    logger.setLevel(logging.WARNING)
    messages: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    logger.addHandler(handler)
    try:
        session = setup(prepared.config.model_copy(update={"output": output}), prepared.plan, ranks, eod_id=None)
        session.saver.close()
        session.loader.close()
        return session.origin.name if session.origin else None, messages
    except RefusedError as error:
        return f"refused: {error}", messages
    finally:
        logger.removeHandler(handler)


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


@pytest.mark.parametrize("every", [4, pytest.param(1, marks=pytest.mark.long)])
def test_harm_to_any_file_is_found_and_named_and_the_checkpoint_before_is_used(
    two_saved: Path, tmp_path: Path, every: int
) -> None:
    cases = []
    for number, file in enumerate(sorted(path.name for path in newest(two_saved).iterdir())):
        for harm in HARMS[number % every :: every]:
            output = tmp_path / f"{harm.__name__}-{file}"
            shutil.copytree(two_saved, output)
            harm(newest(output) / file)
            cases.append((output, file))
    names = {file for _, file in cases}
    assert {".metadata", "manifest.json", "state.json", "run.yaml", "plan.json"} <= names
    assert len([name for name in names if name.startswith("__0_")]) >= 1
    assert len([name for name in names if name.startswith("__1_")]) >= 1

    on_each_rank = run_ranks(2, set_up, run_file(two_saved), [str(output) for output, _ in cases])
    for (output, file), (found, warnings), (found_by_other, _) in zip(cases, *on_each_rank, strict=True):
        assert found == found_by_other == "step-00000002", (output.name, found)
        (warning,) = warnings
        assert "step-00000004 is corrupt and is skipped" in warning
        assert file in warning, (output.name, warning)


def test_every_bit_of_a_manifest_counts(tmp_path: Path) -> None:
    """With any bit flipped, the manifest is refused or differs from the files."""
    names = ("__0_0.distcp", ".metadata", "metadata.json", "run.yaml", "state.json")
    text = manifest_text({name: FileDigest(60 + len(name), "0f" * 16) for name in names}).encode()
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
    "content",
    [
        b"step-00000002\n",
        None,
        *(
            pytest.param(text, marks=pytest.mark.long)
            for text in (b"", b"\x00\xff\x80", b"step-99999999\n", b"../../etc\n")
        ),
    ],
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
    assert run_ranks(2, set_up, run_file(two_saved), [str(output)])[0] == [("step-00000004", [])]
    run_ranks(2, train_here, run_file(two_saved), [f"output={output}", "stop_at_step=5"])
    assert latest.read_text() == "step-00000005\n"


def test_a_run_whose_checkpoints_are_gone_does_not_start_over(two_saved: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    shutil.copytree(two_saved, output)
    for checkpoint in checkpoints_folder(output).glob("step-*"):
        shutil.rmtree(checkpoint)
    with pytest.raises(RankError, match=r"RefusedError: .*no checkpoint, but .*checkpoints/latest: .*are gone"):
        run_ranks(2, train_here, run_file(two_saved), [f"output={output}", "stop_at_step=5"])
    assert not list(checkpoints_folder(output).glob("step-*"))


def test_another_file_of_data_is_refused_and_named_and_the_same_one_elsewhere_is_not(
    two_saved: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    shutil.copytree(two_saved, output)
    write_source(tmp_path / "other", stride=1, seed=1)
    write_source(tmp_path / "same", stride=1)
    run, overrides = run_file(two_saved), [f"output={output}", "stop_at_step=5"]
    with pytest.raises(RankError, match=r"RefusedError: [\s\S]*- data: the files of web differ from"):
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
    with pytest.raises(RankError, match=r"RefusedError: [\s\S]*- data: the files of code differ from"):
        run_ranks(1, train_here, run, [f"sources.code.path={tmp_path / 'other'}"], ["blend", "schedule"])
    longer = (
        "phases=[{name: web, blend: {web: 1.0}, until: {step: 6}}, {name: code, blend: {code: 1.0}, seq_length: 64}]"
    )
    with pytest.raises(RankError, match=r"RefusedError: data state: .* once it was read: code 32 -> 64 tokens"):
        run_ranks(1, train_here, run, [longer], ["blend", "schedule", "phase_length"])
    run_ranks(1, train_here, run, ["stop_at_step=5"], ["blend", "schedule"])
    assert newest(tmp_path / "out").name == "step-00000005"


def test_a_path_that_climbs_out_of_the_folder_is_refused(two_saved: Path, tmp_path: Path) -> None:
    """In the manifest, and in torch's description of the tensors."""
    in_manifest, in_metadata = tmp_path / "manifest", tmp_path / "metadata"
    for output in (in_manifest, in_metadata):
        shutil.copytree(two_saved, output)
    shutil.copy(newest(in_manifest) / "plan.json", newest(in_manifest).parent / "plan.json")
    change_manifest(newest(in_manifest), lambda files: files.update({"../plan.json": files["plan.json"]}))
    ((_, (warning,)),) = run_ranks(2, set_up, run_file(two_saved), [str(in_manifest)])[0]
    assert "../plan.json: not a file of this folder" in warning

    checkpoint = newest(in_metadata)
    metadata = read_metadata(checkpoint)
    for entry in metadata.storage_data.values():
        shutil.copy(checkpoint / entry.relative_path, tmp_path / entry.relative_path)
        entry.relative_path = os.path.relpath(tmp_path / entry.relative_path, checkpoint)
    (checkpoint / ".metadata").write_bytes(pickle.dumps(metadata))
    seal_again(checkpoint)
    with pytest.raises(RankError, match=r"RefusedError: .*\.\./.*outside"):
        run_ranks(2, train_here, run_file(two_saved), [f"output={in_metadata}", "stop_at_step=5"])


def set_up_with_an_odd_rank(run: str, output: str, trouble: str) -> list[tuple[str | None, list[str]]]:
    """Call `set_up`, but rank 1 cannot hash a file of the newest checkpoint, or does not see any checkpoint yet."""
    import torch.distributed as dist

    from megatron_cpt.checkpoint import layout, manifest

    measure = manifest.file_checksum

    def checksum(path: Path, *progress: Callable[[int], None]) -> str:
        if path.parent.name == "step-00000004" and path.name.startswith(trouble):
            raise OSError(5, "Input/output error", str(path))
        return measure(path, *progress)

    with pytest.MonkeyPatch.context() as patch:
        if dist.get_rank() == 1 and trouble == "late":
            patch.setattr(layout, "list_checkpoints", lambda folder: [])
        elif dist.get_rank() == 1:
            patch.setattr(manifest, "file_checksum", checksum)
        return set_up(run, [output])


@pytest.mark.parametrize("file", [pytest.param("state.json", marks=pytest.mark.long), "__1_0.distcp"])
def test_what_one_rank_cannot_read_ends_all_and_no_older_checkpoint_is_used(two_saved: Path, file: str) -> None:
    with pytest.raises(RankError, match=rf"errors\.CptError: .*step-00000004/{file}: Input/output error"):
        run_ranks(2, set_up_with_an_odd_rank, run_file(two_saved), str(two_saved), file)


def test_all_ranks_take_the_same_checkpoint_however_late_one_sees_it(two_saved: Path) -> None:
    seen = run_ranks(2, set_up_with_an_odd_rank, run_file(two_saved), str(two_saved), "late")
    assert seen == [[("step-00000004", [])]] * 2


def test_nothing_of_a_broken_checkpoint_is_left_in_a_run_that_passed_it_over(two_saved: Path, tmp_path: Path) -> None:
    """First one shard is corrupt; then both checkpoints are, the older one in a text file."""
    passed_over, never_there = tmp_path / "passed-over", tmp_path / "never-there"
    for output in (passed_over, never_there):
        shutil.copytree(two_saved, output)
    shutil.rmtree(newest(never_there))
    (newest(never_there).parent / LATEST_FILE).write_text("step-00000002\n")
    for shard in newest(passed_over).glob("__*"):
        middle = shard.stat().st_size * 4
        for bit in range(middle, middle + 8000, 8):  # inside the tensors, so that everything can still be read
            flip_bit(shard, bit)
    runs = [[f"output={output}", "stop_at_step=5"] for output in (passed_over, never_there)]
    assert run_ranks(2, train_several, run_file(two_saved), runs) == [[0, 0]] * 2
    assert differing(newest(passed_over), newest(never_there)) == []
    for checkpoint in newest(passed_over).parent.glob("step-*"):
        _flip_some(checkpoint / ("plan.json" if checkpoint.name == "step-00000002" else "__0_0.distcp"))
    ((refusal, _),) = run_ranks(2, set_up, run_file(two_saved), [str(passed_over)])[0]
    assert refusal is not None
    assert "no valid checkpoint: step-00000005: __0_0.distcp: checksum differs" in refusal
    assert "step-00000002: plan.json: checksum differs" in refusal


def run_file(output: Path) -> str:
    """Return the run.yaml beside a run directory."""
    return str(output.parent / "run.yaml")
