"""YAML dialect of run.yaml."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import megatron_cpt
from megatron_cpt.config import draft_config, dump_yaml, read_mapping
from megatron_cpt.config.load_run import apply_overrides
from megatron_cpt.config.yamlfile import parse_yaml
from megatron_cpt.errors import ConfigError, UserError


@pytest.mark.parametrize("text", ["1e-4", "4.5e-5", "1E-4", "+1e3", "1.e-3"])
def test_floats_need_no_dot(text):
    assert parse_yaml(f"a: {text}", "x") == {"a": float(text)}


@pytest.mark.parametrize("text", ["1e", "e5", "1e5x", "1T"])
def test_what_only_looks_like_a_float_stays_text(text):
    assert parse_yaml(f"a: {text}", "x") == {"a": text}


@pytest.mark.parametrize(
    ("text", "value"),
    [
        *(("010", 10), ("0o10", 8), ("0x1F", 31), ("-7", -7), ("+7", 7), ("-010", -10), ("1e9", 1e9), ("1.e+2", 100.0)),
        *((".5", 0.5), ("5.", 5.0), (".inf", float("inf")), ("-.Inf", float("-inf")), ("~", None), ("", None)),
        *(("Null", None), ("TRUE", True), ("False", False), ("'010'", "010"), ("'yes'", "yes")),
        *(("2024-01-31", "2024-01-31"), ("y", "y"), ("tRue", "tRue"), ("=", "="), ("0o8", "0o8"), ("1T", "1T")),
    ],
)
def test_plain_values_follow_the_core_schema_of_yaml_1_2(text, value):
    found = parse_yaml(f"a: {text}", "x")["a"]
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize("text", ["1_000", "1:04", "1:30.5", "0b11", "-0x1F", "1_0.5", "0_7"])
def test_a_number_of_yaml_1_1_only_is_refused_with_its_line(text):
    with pytest.raises(ConfigError, match=rf"{text} is a number in YAML 1\.1 only; .* \(line 2, column 4\)"):
        parse_yaml(f"b: 1\na: {text}\n", "x")


@pytest.mark.parametrize("text", ["yes", "Yes", "NO", "on", "Off"])
def test_booleans_of_yaml_1_1_are_text(text, run_data):
    assert parse_yaml(f"a: {text}", "x") == {"a": text}
    (problem,) = draft_config(run_data, [f"parallel.sequence={text}"]).problems
    assert problem.startswith(f'parallel.sequence: "{text}": neither true nor false')


def test_an_override_obeys_the_same_rules():
    problems = apply_overrides({}, ["seq_length=1:04", "a=010", "c=!!int 3"])
    assert [problem.split(":")[0] for problem in problems] == ["'seq_length=1", "'c=!!int 3'"]


def test_an_alias_is_a_copy():
    data = parse_yaml("a: &a {b: [1]}\nc: *a", "x")
    data["a"]["b"].append(2)
    assert data["c"] == {"b": [1]}


def test_one_module_parses_yaml():
    package = Path(megatron_cpt.__file__).parent
    users = [
        path.name for path in package.rglob("*.py") if re.search(r"^\s*(import|from) yaml", path.read_text(), re.M)
    ]
    assert sorted(users) == ["task_files.py", "yamlfile.py"]  # the first one only writes, with a tag of lm-eval


def test_schemas_for_files_of_other_programs():
    text = "a: !!python/object/apply:x.y [!!python/tuple [1, 2]]\nb: !!python/name:torch.silu ''\nc: 1.0e-05"
    assert parse_yaml(text, "x", schema="untagged") == {"a": [[1, 2]], "b": "torch.silu", "c": 1e-5}
    assert parse_yaml("{a: no, b: 1.10, c: !!int x}", "x", schema="text") == {"a": "no", "b": "1.10", "c": "x"}


def test_keys_are_text_whatever_yaml_makes_of_them_as_values():
    assert parse_yaml("{2024: 1, on: 2, null: 3, 1.5: 4, no: 5}", "x") == {
        "2024": 1,
        "on": 2,
        "null": 3,
        "1.5": 4,
        "no": 5,
    }


def test_duplicate_key_is_an_error_with_its_place():
    with pytest.raises(ConfigError, match=r"key 'b' is given twice \(line 3, column 3\)"):
        parse_yaml("a:\n  b: 1\n  b: 2\n", "x")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [1", "expected ',' or ']'"),
        ("a:\n\tb: 1", "line 2, column 1"),
        ("? [a]\n: 1", "a key must be plain text"),
        ("a: " + "9" * 5000, "too large"),
        ("a: 9223372036854775808", "too large"),
        ("a: " + "[" * 3000 + "]" * 3000, "not valid YAML"),
        ("a: &x {b: *x}", "remove anchors that contain themselves"),
        ("a: !!python/object/apply:os.system [true]", "the tag 'tag:yaml.org,2002:python/object/apply:os.system'"),
        ('a: !!int ""', "the tag 'tag:yaml.org,2002:int' is not supported"),
        ("a: !mine b", "the tag '!mine' is not supported"),
        ("!!str a: b", "a key must be plain text"),
        (
            "b: &b {c: 1}\na: {<<: *b}",
            "merge keys (<<) are not part of YAML 1.2; write the merged keys out (line 2, column 5)",
        ),
        ('"\\ud800": 1', "U+D800 is not allowed"),
        ('a: "b\\0c"', "U+0000 is not allowed"),
        ('a: "\\U00110000"', "not valid YAML"),
        ("a: \0", "special characters are not allowed"),
    ],
)
def test_invalid_yaml_is_one_line(text, message):
    with pytest.raises(ConfigError) as caught:
        parse_yaml(text, "where")
    assert message in str(caught.value)
    assert len(caught.value.problems) == 1
    assert "\n" not in caught.value.problems[0]


def test_a_few_lines_cannot_stand_for_a_billion_values():
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 10)]
    with pytest.raises(ConfigError, match="more than 1,000,000 values"):
        parse_yaml("\n".join(lines), "x")


def test_files_that_are_no_configuration(tmp_path):
    (tmp_path / "empty").write_text("")
    (tmp_path / "list").write_text("- 1\n")
    (tmp_path / "latin").write_bytes(b"name: \xe9\n")
    for name in ("empty", "list"):
        with pytest.raises(ConfigError, match="not a mapping"):
            read_mapping(tmp_path / name)
    with pytest.raises(UserError, match="not UTF-8"):
        read_mapping(tmp_path / "latin")
    with pytest.raises(UserError, match="No such file"):
        read_mapping(tmp_path / "missing")
    with pytest.raises(UserError, match="Is a directory"):
        read_mapping(tmp_path)


def test_what_is_written_is_read_again(tmp_path):
    data = {"rate": 4.5e-05, "tiny": 1e-300, "list": [1, None, True], "name": "on: [x] ü"}
    data |= {
        f"text {text}": text for text in ("1e9", "0o17", "010", "yes", "1_000", "1:30", "2024-01-31", ".5", "", "<<")
    }
    path = tmp_path / "x.yaml"
    path.write_text(dump_yaml(data), encoding="utf-8")
    assert read_mapping(path) == data
