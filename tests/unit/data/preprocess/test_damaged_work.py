"""Work that an interrupted preprocess has left may be damaged in any way: the result is right, or a file is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from hypothesis import strategies as st

from megatron_cpt.data.preprocess import pipeline, preprocess_run
from megatron_cpt.data.preprocess.inputs import Shard
from megatron_cpt.data.preprocess.join import join_shards
from megatron_cpt.data.preprocess.pipeline import PreprocessOptions, preprocess
from megatron_cpt.errors import RefusedError, UserError
from megatron_cpt.files.checksum import file_checksum
from tests.helpers.damage import DAMAGES, draw_examples, files_below, harm

DOCUMENTS = 100
EXAMPLES = [4, pytest.param(100, marks=pytest.mark.long)]
STAGES = ("encoding", "publishing")
KINDS = {"ordered": {}, "shuffled": {"shuffle": 5}, "split": {"split_tokens": 2000}}


class Killed(BaseException):
    """Stands for the death of the process."""


def write_input(folder: Path) -> Path:
    lines = [json.dumps({"text": f"document {number} of the test"}) for number in range(DOCUMENTS)]
    lines[7] = "{broken"
    (folder / "web.jsonl").write_text("\n".join(lines))
    return folder / "web.jsonl"


def result(folder: Path) -> dict[str, str]:
    """Return the checksum of each published file; the list of bad lines names the folder."""
    files = (path for path in folder.glob("p*") if path.is_file() and not path.name.endswith(".bad.jsonl"))
    return {path.name: file_checksum(path) for path in files}


def run(folder: Path, **options: object) -> None:
    preprocess(
        [folder / "web.jsonl"], folder / "p", tokenizer="byte", options=PreprocessOptions(block_bytes=400, **options)
    )


def interrupt(folder: Path, stage: str, **options: object) -> None:
    """Leave the work folder of a run that died: in the middle of its input, or after its first rename."""
    with pytest.MonkeyPatch.context() as patch:
        if stage == "encoding":
            patch.setattr(preprocess_run, "SAVE_SECONDS", -1)
            real, calls = preprocess_run._Run._write, []

            def write(self, block) -> None:
                calls.append(block)
                if len(calls) == 6:
                    raise Killed
                real(self, block)

            patch.setattr(preprocess_run._Run, "_write", write)
        else:
            publish = pipeline.publish

            def publish_one(renames) -> None:
                publish(renames[:1])
                raise Killed

            patch.setattr(pipeline, "publish", publish_one)
        with pytest.raises(Killed):
            run(folder, **options)


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory):
    """Return per kind and stage: a folder with input and interrupted work, and the files of a quiet run."""
    made = {}
    for kind, options in KINDS.items():
        quiet = tmp_path_factory.mktemp("quiet")
        write_input(quiet)
        run(quiet, **options)
        for stage in STAGES:
            folder = tmp_path_factory.mktemp(f"{kind}-{stage}")
            shutil.copy2(quiet / "web.jsonl", folder)
            interrupt(folder, stage, **options)
            made[kind, stage] = folder, result(quiet)
    return made


@pytest.mark.parametrize("examples", EXAMPLES)
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_run_goes_on_from_damaged_work_to_the_same_bytes_or_refuses(interrupted, tmp_path, kind, stage, examples):
    folder, expected = interrupted[kind, stage]
    shutil.copytree(folder, tmp_path / "copy")  # the work folder holds absolute paths, so each example is restored

    def check(data: st.DataObject) -> None:
        shutil.rmtree(folder)
        shutil.copytree(tmp_path / "copy", folder)
        kept = [*files_below(folder / "p.preprocess"), *sorted(folder.glob("p*.bin"))]
        harm(data.draw(st.sampled_from(kept)), data)
        try:
            run(folder, **KINDS[kind])
        except (UserError, RefusedError) as error:
            assert str(folder) in str(error)  # noqa: PT017 - several outcomes are right
            shutil.rmtree(folder / "p.preprocess")
            run(folder, overwrite=True, **KINDS[kind])
        assert result(folder) == expected
        assert not (folder / "p.preprocess").exists()

    draw_examples(check, examples)


@pytest.mark.parametrize("examples", EXAMPLES)
@pytest.mark.parametrize("kind", KINDS)
def test_damaged_shards_are_refused_by_name_or_give_the_same_bytes(tmp_path, kind, examples):
    folder = tmp_path / "join"
    folder.mkdir()
    write_input(folder)
    run(folder, **KINDS[kind])
    expected = result(folder)
    for path in folder.glob("p*"):
        path.unlink()
    for index in range(2):
        run(folder, shard=Shard(index, 2), **KINDS[kind])
    shutil.copytree(folder, tmp_path / "copy")

    def check(data: st.DataObject) -> None:
        shutil.rmtree(folder)
        shutil.copytree(tmp_path / "copy", folder)
        path = data.draw(st.sampled_from([path for each in folder.glob("p.pre*") for path in files_below(each)]))
        harm(path, data)
        try:
            join_shards(folder / "p", 2)
        except (UserError, RefusedError) as error:
            assert str(path.parent) in str(error)  # noqa: PT017 - several outcomes are right
            if path.name == "settings.json":
                shutil.rmtree(path.parent)
            index = int(path.parent.name.partition("-")[2][0])
            run(folder, shard=Shard(index, 2), **KINDS[kind])  # encodes again what it finds damaged
            join_shards(folder / "p", 2)
        assert result(folder) == expected

    draw_examples(check, examples)


def test_a_cut_work_file_is_not_lengthened_with_zeros(tmp_path):
    write_input(tmp_path)
    run(tmp_path)
    expected = result(tmp_path)
    for path in tmp_path.glob("p*"):
        path.unlink()
    interrupt(tmp_path, "encoding")
    DAMAGES["cut"](tmp_path / "p.preprocess" / "0.tokens", 100)
    said: list[str] = []
    run(tmp_path, notify=said.append)
    assert result(tmp_path) == expected
    assert any("0.tokens: only 100 of" in text and text.startswith("starting from scratch") for text in said)


def test_a_half_copied_shard_is_refused_by_name(tmp_path):
    write_input(tmp_path)
    for index in range(2):
        run(tmp_path, shard=Shard(index, 2))
    path = tmp_path / "p.preprocess-1-of-2" / "0.tokens"
    DAMAGES["cut"](path, path.stat().st_size // 2)
    with pytest.raises(RefusedError, match=r"1-of-2/0\.tokens: only [\d,]+ of [\d,]+ bytes are left; copy .*1-of-2 "):
        join_shards(tmp_path / "p", 2)
    assert not list(tmp_path.glob("p.bin"))


@pytest.mark.parametrize("content", ["[]", "{}", "null", '{"lengths": {}, "state": {"done": true}}', '"\\ud800"', ""])
def test_a_state_of_anything_else_is_no_traceback(tmp_path, content):
    write_input(tmp_path)
    run(tmp_path, shard=Shard(0, 1))
    (tmp_path / "p.preprocess-0-of-1" / "state.json").write_text(content)
    with pytest.raises(RefusedError, match=r"state\.json: damaged, or written by another version"):
        join_shards(tmp_path / "p", 1)
    run(tmp_path, shard=Shard(0, 1))
    assert join_shards(tmp_path / "p", 1).documents == DOCUMENTS - 1


def test_another_program_that_writes_into_a_work_file_is_noticed(tmp_path, monkeypatch):
    write_input(tmp_path)
    real, calls = preprocess_run._Run._write, []

    def write(self, block) -> None:
        calls.append(block)
        if len(calls) == 4:
            DAMAGES["cut"](tmp_path / "p.preprocess" / "0.tokens", 10)
        real(self, block)

    monkeypatch.setattr(preprocess_run._Run, "_write", write)
    with pytest.raises(
        Exception, match=r"0\.tokens: has 10 bytes, [\d,]+ were written: another program has changed it"
    ):
        run(tmp_path)
