"""YAML dialect of run.yaml."""

from __future__ import annotations

import pytest

from megatron_cpt.config import dump_yaml, read_mapping
from megatron_cpt.config.yamlfile import parse_yaml
from megatron_cpt.errors import ConfigError, UserError


@pytest.mark.parametrize("text", ["1e-4", "4.5e-5", "1E-4", "+1e3", "1.e-3"])
def test_floats_need_no_dot(text):
    assert parse_yaml(f"a: {text}", "x") == {"a": float(text)}


@pytest.mark.parametrize("text", ["1e", "e5", "1e5x", "1T"])
def test_what_only_looks_like_a_float_stays_text(text):
    assert parse_yaml(f"a: {text}", "x") == {"a": text}


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


def test_merged_keys_may_be_overridden():
    text = "base: &base {tokens: 1, max_epochs: 4}\nweb: {<<: *base, tokens: 2}\ncode: {<<: *base}\n"
    data = parse_yaml(text, "x")
    assert data["web"] == {"tokens": 2, "max_epochs": 4}
    assert data["code"] == {"tokens": 1, "max_epochs": 4}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [1", "expected ',' or ']'"),
        ("a:\n\tb: 1", "line 2, column 1"),
        ("? [a]\n: 1", "a key must be plain text"),
        ("a: " + "9" * 5000, "too large"),
        ("a: 9223372036854775808", "too large"),
        ("a: 2024-13-45", "month must be in 1..12"),
        ("a: " + "[" * 3000 + "]" * 3000, "not valid YAML"),
        ("a: &x {b: *x}", "remove anchors that contain themselves"),
        ("a: !!python/object/apply:os.system [true]", "could not determine a constructor"),
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
    data = {"rate": 4.5e-05, "tiny": 1e-300, "text": "1e9", "list": [1, None, True], "name": "on: [x] ü"}
    path = tmp_path / "x.yaml"
    path.write_text(dump_yaml(data), encoding="utf-8")
    assert read_mapping(path) == data
