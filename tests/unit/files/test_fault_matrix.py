"""Commands under faults of the disk and the clock: the right result, or one message with status 1.

The complete matrix runs with `make test-long`; its counts are printed. Here every tenth case of three commands runs.
"""

from __future__ import annotations

import os
import random
from collections.abc import Iterator

import pytest

from tests.helpers.faulty_io import Rule, build, matrix
from tests.helpers.faulty_io.matrix import Case, Command, Matrix
from tests.helpers.faulty_io.server import FaultyCommands

pytestmark = pytest.mark.skipif(build() is None, reason="needs a C compiler")


@pytest.fixture(scope="module")
def data_matrix(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Matrix]:
    folder = tmp_path_factory.mktemp("matrix")
    matrix.write_text_inputs(folder)
    matrix.write_run(folder)
    with FaultyCommands(folder) as commands:
        yield Matrix(folder, commands)


@pytest.fixture(scope="module")
def torch_matrix(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Matrix]:
    folder = tmp_path_factory.mktemp("torch")
    matrix.write_text_inputs(folder)
    matrix.write_run(folder)
    with FaultyCommands(folder, with_torch=True) as commands:
        matrix.write_torch_inputs(folder, commands)
        yield Matrix(folder, commands)


def named(name: str) -> Command:
    """Return a command of the matrix."""
    return next(command for command in (*matrix.DATA_COMMANDS, *matrix.TORCH_COMMANDS) if command.name == name)


def share(cases: list[Case], number: int) -> list[Case]:
    """Return some of the cases, the same ones each time."""
    return random.Random(0).sample(cases, min(number, len(cases)))


@pytest.mark.parametrize(("name", "number"), [("preprocess jsonl", 8), ("preprocess parquet", 8), ("merge", 12)])
def test_some_faults_of_every_file(data_matrix: Matrix, name: str, number: int) -> None:
    for case in share(data_matrix.cases(named(name)), number):
        data_matrix.run(case)
    assert not data_matrix.failures, "\n".join(data_matrix.failures)


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
@pytest.mark.parametrize(("fault", "count", "value"), [("short", 0, 100), ("EIO", 1, 0), ("ESTALE", 1, 0)])
def test_short_and_failing_reads_lose_no_document(
    data_matrix: Matrix, kind: str, fault: str, count: int, value: int
) -> None:
    """Before, 3,519 of 9,000 documents came out of short reads, and one EIO was "1 bad line" of a parquet file."""
    command = named(f"preprocess {kind}")
    if command.name not in data_matrix.quiet:
        data_matrix.cases(command)
    glob = f"{data_matrix.folder}/in/web.{kind}"
    outcome = data_matrix.outcome(command, [Rule(fault, "read", glob, first=2, count=count, value=value)])
    assert (outcome.status, outcome.hits[1] > 0) == (0, True), outcome.stderr
    assert data_matrix.differing(command, outcome) == []
    assert (fault == "short") != ("attempt 1 of 5 failed" in outcome.stderr)


def test_each_read_of_a_checkpoints_metadata_may_fail_once(torch_matrix: Matrix) -> None:
    """Before, one EIO ended the job without the name of a file: megatron-core read this file."""
    command = named("resume")
    torch_matrix.cases(command)
    glob = f"{torch_matrix.folder}/*/step-*/metadata.json"
    number = 0
    while True:
        number += 1
        outcome = torch_matrix.outcome(command, [Rule("EIO", "read", glob, first=number, count=1)])
        if not outcome.hits[1]:
            break
        assert outcome.status == 0, outcome.stderr
        assert torch_matrix.differing(command, outcome) == []
    assert number > 3, "verified and read"


@pytest.mark.parametrize("name", ["common.pt", "metadata.json"])
def test_what_megatron_core_writes_may_fail(torch_matrix: Matrix, name: str) -> None:
    """Before, a failed write of common.pt was a traceback: torch raises a RuntimeError."""
    rule = Rule("EIO", "write", f"{torch_matrix.folder}/*/.step-00000001.tmp/{name}", count=1)
    command = named("train")
    torch_matrix.cases(command)
    outcome = torch_matrix.outcome(command, [rule])
    if not outcome.hits[1]:
        pytest.skip(f"this version of megatron-core writes no {name}")
    assert outcome.status == 1
    assert "error: the checkpoint of step 1 was not written: rank 0: " in outcome.stderr
    assert "Traceback" not in outcome.stderr
    again = torch_matrix.outcome(command, is_repeated=True)
    assert (again.status, torch_matrix.differing(command, again)) == (0, [])


@pytest.mark.long
def test_every_fault_of_every_file_of_the_data_commands(data_matrix: Matrix) -> None:
    run_all(data_matrix, matrix.DATA_COMMANDS)


@pytest.mark.long
def test_every_fault_of_every_file_of_training_and_conversion(torch_matrix: Matrix) -> None:
    run_all(torch_matrix, matrix.TORCH_COMMANDS)


def run_all(cases: Matrix, commands: tuple[Command, ...]) -> None:
    """Run the cases of all commands, or `FAULTY_IO_CASES` of each, and print the counts."""
    most = int(os.environ.get("FAULTY_IO_CASES", "1000000"))
    for command in commands:
        for case in share(cases.cases(command), most):
            cases.run(case)
        print(f"after {command.name}: {dict(cases.counts)}", flush=True)
    assert not cases.failures, "\n".join(cases.failures)
