"""metrics.jsonl as columns: exact numbers, lines of later lives, growing files, and foreign lines."""

from __future__ import annotations

import math
import os

import orjson
import pytest

from megatron_cpt.report.metrics_columns import MAX_SOURCES, MetricsReader
from tests.helpers.report_runs import training_line, validation_line, write_lines


def read(path):
    return MetricsReader(path).update()


def test_columns_have_the_numbers_of_the_lines(tmp_path):
    path = tmp_path / "metrics.jsonl"
    evaluation = {"step": 20, "evaluation": {"quiz": {"acc": 0.5, "alias": "quiz"}}}
    write_lines(path, [validation_line(0, web=4.0), training_line(10), training_line(20, mfu=None), evaluation])
    found = read(path)
    assert list(found.steps) == [10, 20]
    assert list(found.scalars["loss"]) == [4.9, 4.8]
    assert found.scalars["mfu"][0] == 0.4
    assert math.isnan(found.scalars["mfu"][1])
    assert {name: list(column) for name, column in found.loss_by_source.items()} == {
        "web": [4.9, 4.8],
        "code": [5.0, 4.8 + 0.1],
    }
    assert found.validations == {0: {"web": 4.0}}
    assert found.evaluations == {20: {"quiz": {"acc": 0.5}}}
    assert found.last["step"] == 20
    assert (found.num_foreign, found.is_torn) == (0, False)


def test_a_source_that_comes_later_has_no_loss_before(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write_lines(path, [training_line(140), training_line(160)])
    found = read(path)
    assert math.isnan(found.loss_by_source["qa"][0])
    assert found.loss_by_source["qa"][1] == pytest.approx(3.6)
    assert found.phases == [(140, "general"), (160, "qa")]


@pytest.mark.parametrize("blank", [b"", b"\n"], ids=["together", "apart"])  # a blank line is read line by line
def test_lines_of_a_later_life_replace_the_lines_beyond_its_resume_step(tmp_path, blank):
    path = tmp_path / "metrics.jsonl"
    first = [training_line(step) for step in (10, 20, 30, 40)]
    first += [validation_line(30, web=1.0), validation_line(40, web=1.0)]
    second = [training_line(step, loss=7.0, loss_by_source={"new": 7.0}) for step in (30, 40)]
    second += [validation_line(40, web=2.0), training_line(50)]
    path.write_bytes(blank.join(orjson.dumps(line) + b"\n" for line in first + second))
    found = read(path)
    assert list(found.steps) == [10, 20, 30, 40, 50]
    assert list(found.scalars["loss"]) == [4.9, 4.8, 7.0, 7.0, 4.5]
    assert math.isnan(found.loss_by_source["web"][2])
    assert found.validations == {40: {"web": 2.0}}
    assert found.resumed_after == [29]


def test_a_torn_last_line_is_named_and_read_once_it_is_complete(tmp_path):
    path = tmp_path / "metrics.jsonl"
    whole, torn = orjson.dumps(training_line(10)) + b"\n", orjson.dumps(training_line(20)) + b"\n"
    path.write_bytes(whole + torn[:50])
    reader = MetricsReader(path)
    assert (list(reader.update().steps), reader.columns.is_torn) == ([10], True)
    path.write_bytes(whole + torn)
    assert (list(reader.update().steps), reader.columns.is_torn) == ([10, 20], False)
    assert reader.columns.num_foreign == 0


def test_only_new_lines_are_read_again(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write_lines(path, [training_line(10)])
    reader = MetricsReader(path)
    reader.update()
    content = bytearray(path.read_bytes())
    content[: content.index(b"\n")] = b"x" * content.index(b"\n")  # unchanged in size, so it is not read again
    with open(path, "r+b") as file:
        file.write(content + orjson.dumps(training_line(20)) + b"\n")
    assert list(reader.update().steps) == [10, 20]
    assert reader.columns.num_foreign == 0


def test_a_file_that_a_resumed_run_has_rewritten_is_read_again(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write_lines(path, [training_line(10), training_line(20)])
    reader = MetricsReader(path)
    reader.update()
    write_lines(tmp_path / "new", [training_line(10, loss=1.0), training_line(20), training_line(30)])
    os.replace(tmp_path / "new", path)
    found = reader.update()
    assert list(found.steps) == [10, 20, 30]
    assert found.scalars["loss"][0] == 1.0
    path.unlink()
    assert list(reader.update().steps) == []


@pytest.mark.parametrize(
    "line",
    [
        *(
            b"garbage",
            b"[1, 2]",
            b"null",
            b"3",
            b'{"loss": 1}',
            b'{"step": "7", "loss": 1}',
            b'{"step": -1, "loss": 1}',
        ),
        *(b'{"step": true, "loss": 1}', b'{"step": 1e300, "loss": 1}', b'{"step": 9223372036854775807, "loss": 1}'),
        *(b'{"step": 3}', b'{"step": 3, "validation": [1]}', b"[" * 5000, b"\xff\xfe\x00", b'{"step": 3, "loss": '),
    ],
)
def test_a_foreign_line_is_counted_and_changes_nothing(tmp_path, line):
    path = tmp_path / "metrics.jsonl"
    lines = [orjson.dumps(training_line(step)) for step in (10, 20, 30)]
    path.write_bytes(b"\n".join([lines[0], line, *lines[1:]]) + b"\n")
    found = read(path)
    assert (list(found.steps), found.num_foreign, found.first_foreign) == ([10, 20, 30], 1, 2)


def test_values_of_other_types_are_unknown_numbers(tmp_path):
    path = tmp_path / "metrics.jsonl"
    odd = training_line(10, loss=None, lr="fast", loss_by_source={"web": None, "code": [1]}, phase=7)
    write_lines(path, [odd, training_line(20, loss_by_source=[1, 2], samples_by_source=3)])
    found = read(path)
    assert list(found.steps) == [10, 20]
    assert math.isnan(found.scalars["loss"][0])
    assert math.isnan(found.scalars["lr"][0])
    assert [math.isnan(value) for value in found.loss_by_source["web"]] == [True, True]
    assert found.phases == [(20, "general")]


def test_columns_are_limited_to_the_first_sources(tmp_path):
    path = tmp_path / "metrics.jsonl"
    losses = {f"source-{number}": 1.0 for number in range(MAX_SOURCES + 10)}
    write_lines(path, [training_line(10, loss_by_source=losses)])
    found = read(path)
    assert len(found.loss_by_source) == MAX_SOURCES
    assert found.hides_sources


def test_a_line_longer_than_a_block_is_one_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write_lines(path, [training_line(10, note="x" * 300_000), training_line(20)])
    assert list(read(path).steps) == [10, 20]
