"""Atomic writes, and work folders whose work is resumed only with the same settings and by one process at a time."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from megatron_cpt.errors import UserError
from megatron_cpt.files.atomic import write_atomically
from megatron_cpt.files.resumable import DurableJournal, ResumableFolder

SETTINGS = {"inputs": ["a", "b"], "size": (1, 2)}


def interrupt(*_):
    raise KeyboardInterrupt


def open_folder(path, settings=SETTINGS, **options):
    return ResumableFolder(path, settings, progress_file="journal.jsonl", **options)


def do_part(path, name="part", **options) -> list[str]:
    """Open the folder, finish one part and return the parts that were there before."""
    with open_folder(path, **options) as folder:
        journal = DurableJournal(folder.path / "journal.jsonl")
        earlier = list(journal.lines)
        (folder.path / name).write_text(name)
        journal.record(name)
    return earlier


class TestWriteAtomically:
    @pytest.mark.parametrize("content", ["text ü\n", b"\x00\xff"])
    def test_replaces_and_leaves_nothing_else(self, tmp_path, content):
        for has_several_writers in (False, True):
            write_atomically(tmp_path / "file", b"old")
            write_atomically(tmp_path / "file", content, has_several_writers=has_several_writers)
            expected = content.encode() if isinstance(content, str) else content
            assert (tmp_path / "file").read_bytes() == expected
            assert os.listdir(tmp_path) == ["file"]

    def test_an_error_keeps_the_old_content(self, tmp_path, monkeypatch):
        def fail(fd):
            raise OSError("disk")

        write_atomically(tmp_path / "file", "old")
        monkeypatch.setattr(os, "fsync", fail)
        with pytest.raises(OSError, match="disk"):
            write_atomically(tmp_path / "file", "new")
        assert (tmp_path / "file").read_text() == "old"
        assert os.listdir(tmp_path) == ["file"]


class TestResumableFolder:
    def test_the_same_settings_resume(self, tmp_path):
        assert do_part(tmp_path / "work", "one") == []
        assert do_part(tmp_path / "work", "two") == ["one"]
        assert do_part(tmp_path / "work", "three") == ["one", "two"]
        assert os.listdir(tmp_path) == ["work"]  # the lock file is gone

    def test_other_settings_are_refused_by_name(self, tmp_path):
        do_part(tmp_path / "work")
        with pytest.raises(UserError, match=r"work: .*other settings \(different: more, size\); .* --restart"):
            do_part(tmp_path / "work", settings={"inputs": ["a", "b"], "size": [1, 3], "more": 1})
        assert do_part(tmp_path / "work") == ["part"]

    @pytest.mark.parametrize("option", ["should_restart", "should_discard_other_settings"])
    def test_other_settings_start_from_scratch(self, tmp_path, option):
        do_part(tmp_path / "work", "one")
        assert do_part(tmp_path / "work", "two", settings={"inputs": []}, **{option: True}) == []
        assert sorted(os.listdir(tmp_path / "work")) == ["journal.jsonl", "settings.json", "two"]
        assert do_part(tmp_path / "work", settings={"inputs": []}) == ["two"]

    def test_without_progress_the_settings_do_not_matter(self, tmp_path):
        with open_folder(tmp_path / "work") as folder:
            (folder.path / "half").touch()
        assert do_part(tmp_path / "work", settings={}) == []
        assert not (tmp_path / "work" / "half").exists()

    def test_a_folder_of_something_else_is_left_alone(self, tmp_path):
        (tmp_path / "work").mkdir()
        do_part(tmp_path / "work")  # an empty folder may be used
        (tmp_path / "work" / "settings.json").unlink()
        with pytest.raises(UserError, match=r"work: holds files of something else"):
            do_part(tmp_path / "work", should_restart=True)
        assert (tmp_path / "work" / "part").exists()

    @pytest.mark.parametrize("content", ['{"theme": "dark"}', "[1]", "not JSON"])
    def test_the_settings_of_another_program_are_left_alone(self, tmp_path, content):
        (tmp_path / "work").mkdir()
        for name in ("journal.jsonl", "notes.txt"):
            (tmp_path / "work" / name).write_text("[1]")
        (tmp_path / "work" / "settings.json").write_text(content)
        for options in ({}, {"should_discard_other_settings": True}, {"should_restart": True}):
            with pytest.raises(UserError, match=r"work: holds files of something else"):
                do_part(tmp_path / "work", **options)
        assert (tmp_path / "work" / "notes.txt").exists()

    def test_a_kill_before_the_final_name_is_resumed(self, tmp_path, monkeypatch):
        do_part(tmp_path / "work", "one")
        monkeypatch.setattr(os, "rename", interrupt)
        with pytest.raises(KeyboardInterrupt), open_folder(tmp_path / "work") as folder:
            folder.publish_as(tmp_path / "result")
        monkeypatch.undo()
        assert do_part(tmp_path / "work", "two") == ["one"]
        with open_folder(tmp_path / "work") as folder:
            folder.publish_as(tmp_path / "result")
        assert sorted(os.listdir(tmp_path / "result")) == ["one", "two"]

    def test_a_kill_while_it_is_emptied_starts_from_scratch(self, tmp_path, monkeypatch):
        do_part(tmp_path / "work", "one")
        do_part(tmp_path / "work", "two")
        kill = "megatron_cpt.files.resumable.write_atomically"
        monkeypatch.setattr(kill, interrupt)
        with pytest.raises(KeyboardInterrupt):
            do_part(tmp_path / "work", should_restart=True)
        monkeypatch.undo()
        assert do_part(tmp_path / "work", "three", settings={}) == []

    def test_one_process_at_a_time(self, tmp_path):
        code = (
            "import sys\nfrom pathlib import Path\nfrom megatron_cpt.files.resumable import ResumableFolder\n"
            "with ResumableFolder(Path(sys.argv[1]), {'inputs': [], 'size': 0}, progress_file='journal.jsonl'):\n"
            "    print('locked', flush=True)\n    sys.stdin.read()\n"
        )
        command = [sys.executable, "-c", code, str(tmp_path / "work")]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
            assert process.stdout.readline() == b"locked\n"
            with pytest.raises(UserError, match="work: another process is working on it"):
                do_part(tmp_path / "work")
            process.kill()
            process.wait()
        assert do_part(tmp_path / "work") == []  # the lock of a killed process is free

    def test_remove_and_publish(self, tmp_path):
        with open_folder(tmp_path / "work") as folder:
            DurableJournal(folder.path / "journal.jsonl").record(1)
            folder.remove()
        assert os.listdir(tmp_path) == []
        (tmp_path / "result").mkdir()
        do_part(tmp_path / "work")
        with open_folder(tmp_path / "work") as folder:
            folder.publish_as(tmp_path / "result")
        assert [str(path.relative_to(tmp_path)) for path in sorted(tmp_path.rglob("*"))] == ["result", "result/part"]

    def test_a_place_that_cannot_be_written(self, tmp_path):
        (tmp_path / "file").touch()
        with pytest.raises(UserError, match="file/work: cannot be written"):
            do_part(tmp_path / "file" / "work")


def test_an_incomplete_last_line_of_a_journal_is_dropped(tmp_path):
    path = tmp_path / "journal.jsonl"
    DurableJournal(path).record({"file": "a"})
    path.write_bytes(path.read_bytes() + b'{"file": "b')
    journal = DurableJournal(path)
    journal.record({"file": "c"})
    assert journal.lines == DurableJournal(path).lines == [{"file": "a"}, {"file": "c"}]
