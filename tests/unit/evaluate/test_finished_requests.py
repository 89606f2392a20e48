"""Answers of finished requests survive kills, damage and other processes."""

from __future__ import annotations

import os
import sqlite3
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from megatron_cpt.errors import CptError, UserError
from megatron_cpt.evaluate.finished_requests import FinishedRequests, request_key
from tests.helpers.faulty_io import Control, Rule, build

KEYS = [request_key("digest", "loglikelihood", [[1, 2], [number]]) for number in range(400)]


def test_answers_are_found_again_with_every_bit(tmp_path: Path) -> None:
    answers = {KEYS[0]: [-1.0000000000000002, True], KEYS[1]: "text \u2603", KEYS[2]: [float(2**60 + 1), False]}
    first = FinishedRequests(tmp_path / "finished.sqlite")
    first.add(answers)
    assert FinishedRequests(tmp_path / "finished.sqlite").find(KEYS) == answers, "also while the first one is open"
    first.close()


@pytest.mark.parametrize(
    "other",
    [
        request_key("other digest", "loglikelihood", [[1], [2]]),
        request_key("digest", "generate", [[1], [2]]),
        request_key("digest", "loglikelihood", [[1, 2], []]),
        request_key("digest", "loglikelihood", [[12], []]),
    ],
)
def test_a_key_depends_on_everything(other: bytes) -> None:
    assert other != request_key("digest", "loglikelihood", [[1], [2]])


def test_a_key_does_not_depend_on_the_order_of_options() -> None:
    options = {"temperature": 0.0, "max_tokens": 4}
    assert request_key("", "", options) == request_key("", "", dict(reversed(options.items())))


def test_a_damaged_answer_is_computed_again(tmp_path: Path) -> None:
    path = tmp_path / "finished.sqlite"
    FinishedRequests(path).add({KEYS[0]: -1.25, KEYS[1]: -2.5})
    with sqlite3.connect(path) as database:
        database.execute("UPDATE answers SET answer = ? WHERE request = ?", (b"-9.25", KEYS[0]))
    finished = FinishedRequests(path)
    assert finished.find(KEYS) == {KEYS[1]: -2.5}
    finished.add({KEYS[0]: -1.25})
    assert finished.find(KEYS[:1]) == {KEYS[0]: -1.25}


@pytest.mark.parametrize("answer", [[float("nan"), False], float("nan")])
def test_a_nan_of_an_earlier_version_counts_as_missing(tmp_path: Path, answer: Any) -> None:
    finished = FinishedRequests(tmp_path / "finished.sqlite")
    finished.add({KEYS[0]: answer, KEYS[1]: "null"})
    assert finished.find(KEYS) == {KEYS[1]: "null"}


@pytest.mark.parametrize("content", [b"a text file, long enough for a header " * 4, b"SQLite format 3\0" + b"\0" * 84])
def test_a_file_of_another_kind_is_named(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "notes.txt"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"notes\.txt: not a file of finished requests, or damaged .* delete it"):
        FinishedRequests(path)
    assert path.read_bytes() == content


def test_a_file_cut_in_half_is_named(tmp_path: Path) -> None:
    path = tmp_path / "finished.sqlite"
    FinishedRequests(path).add(dict.fromkeys(KEYS, -1.5))
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match=r"damaged .* delete it"):
        FinishedRequests(path).find(KEYS)


def test_a_file_that_lost_its_table_is_called_damaged(tmp_path: Path) -> None:
    finished = FinishedRequests(tmp_path / "finished.sqlite")
    finished.add(dict.fromkeys(KEYS, -1.5))
    with (tmp_path / "finished.sqlite").open("r+b") as file:
        file.truncate(0)
    with pytest.raises(UserError, match=r"damaged \(no such table: answers\); delete it"):
        finished.find(KEYS)


def test_a_file_that_was_moved_is_said_to_be(tmp_path: Path) -> None:
    finished = FinishedRequests(tmp_path / "finished.sqlite")
    (tmp_path / "finished.sqlite").rename(tmp_path / "other.sqlite")
    with pytest.raises(CptError, match=r"finished\.sqlite: .* the file was moved or deleted meanwhile; run"):
        finished.add({KEYS[0]: -1.5})


def test_an_answer_that_is_no_text_is_no_traceback(tmp_path: Path) -> None:
    path = tmp_path / "finished.sqlite"
    FinishedRequests(path).add({KEYS[0]: -1.5})
    with sqlite3.connect(path) as database:
        database.execute("UPDATE answers SET answer = CAST(x'fffe' AS TEXT)")
    with pytest.raises(UserError, match="damaged"):
        FinishedRequests(path).find(KEYS)


def test_the_name_of_a_database_in_memory_is_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    FinishedRequests(Path(":memory:")).add({KEYS[0]: -1.5})
    assert FinishedRequests(Path(":memory:")).find(KEYS) == {KEYS[0]: -1.5}


def test_the_file_of_another_program_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "other.sqlite"
    with sqlite3.connect(path) as database:
        database.execute("CREATE TABLE answers (question TEXT)")
    content = path.read_bytes()
    with pytest.raises(UserError, match="of another program; choose another"):
        FinishedRequests(path)
    assert path.read_bytes() == content


def test_a_file_of_a_newer_format_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "finished.sqlite"
    FinishedRequests(path).close()
    with sqlite3.connect(path) as database:
        database.execute("PRAGMA user_version = 9")
    with pytest.raises(UserError, match="format 9, this software reads 1"):
        FinishedRequests(path)


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(CptError, match=r"none/finished\.sqlite: finished requests cannot be kept"):
        FinishedRequests(tmp_path / "none" / "finished.sqlite")


def test_two_processes_write_at_the_same_time(tmp_path: Path) -> None:
    path = tmp_path / "finished.sqlite"
    script = (
        "import sys; from pathlib import Path\n"
        "from megatron_cpt.evaluate.finished_requests import FinishedRequests, request_key\n"
        "finished = FinishedRequests(Path(sys.argv[1]))\n"
        "for n in range(60): finished.add({request_key('digest', 'loglikelihood', [sys.argv[2], n // 2]): n})\n"
    )
    processes = [subprocess.Popen([sys.executable, "-c", script, str(path), word]) for word in ("one", "two")]
    assert [process.wait() for process in processes] == [0, 0]
    keys = [request_key("digest", "loglikelihood", [word, n]) for word in ("one", "two") for n in range(30)]
    assert len(FinishedRequests(path).find(keys)) == 60


FIND_ALL = (
    "import sys; from pathlib import Path\n"
    "from megatron_cpt.evaluate.finished_requests import FinishedRequests, request_key\n"
    "keys = [request_key('digest', 'loglikelihood', [[1, 2], [number]]) for number in range(400)]\n"
    "finished = FinishedRequests(Path(sys.argv[1]))\n"
    "finished.add({keys[-1]: -2.5})\n"
    "print(len(finished.find(keys)))\n"
)


def find_all_on_a_failing_disk(path: Path, call: str, first: int, count: int) -> subprocess.CompletedProcess[str]:
    library = build()
    if library is None:
        pytest.skip("needs a C compiler")
    control = Control(path.with_name("control"))
    control.write([Rule("EIO", call, f"{path}*", first=first, count=count), Rule("skip", "sleep", "*", value=1)])
    environment = {**os.environ, "LD_PRELOAD": str(library), "FAULTY_IO": str(control.path)}
    done = subprocess.run(
        [sys.executable, "-c", FIND_ALL, str(path)], env=environment, capture_output=True, text=True, check=False
    )
    assert control.hits()[0] > 0
    return done


@pytest.mark.parametrize(("call", "first"), [*(("read", n) for n in range(1, 6)), ("write", 1), ("fsync", 1)])
def test_a_fault_of_the_disk_that_passes_changes_nothing(tmp_path: Path, call: str, first: int) -> None:
    path = tmp_path / "finished.sqlite"
    FinishedRequests(path).add(dict.fromkeys(KEYS[:-1], -1.5))
    done = find_all_on_a_failing_disk(path, call, first, 1)
    assert (done.stdout, done.returncode) == ("400\n", 0), done.stderr


@pytest.mark.parametrize("first", [1, 2, 3])
def test_a_disk_that_fails_is_never_called_damage(tmp_path: Path, first: int) -> None:
    path = tmp_path / "finished.sqlite"
    FinishedRequests(path).add(dict.fromkeys(KEYS, -1.5))
    content = path.read_bytes()
    done = find_all_on_a_failing_disk(path, "read", first, 0)
    assert "finished.sqlite: finished requests cannot be read (Input/output error); check the disk" in done.stderr
    assert path.read_bytes() == content
