"""Counts, spans and their short forms."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_cpt.config import draft_config, format_bytes, format_count, format_number_of, parse_count
from megatron_cpt.config.quantities import COUNT_SCHEMA, parse_span


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("300B", 300_000_000_000),
        ("2.5M", 2_500_000),
        ("1T", 10**12),
        ("1e9", 10**9),
        (1e9, 10**9),
        (4096, 4096),
        ("800k", 800_000),
        ("1.1B", 1_100_000_000),
        ("0.1T", 10**11),
        ("1_000", 1000),
        (" 16 B ", 16 * 10**9),
        ("2.8B", 2_800_000_000),
        ("1E3K", 10**6),
        ("0", 0),
    ],
)
def test_counts(text, count):
    assert parse_count(text) == count


@pytest.mark.parametrize(
    "text",
    [
        "",
        "x",
        "-1",
        -1,
        "1.5",
        1.5,
        "1e-3",
        "3 GB",
        "1,000",
        True,
        None,
        [],
        float("nan"),
        float("inf"),
        "1e400",
        "1e19",
    ],
)
def test_invalid_counts(text):
    with pytest.raises(ValueError, match=r"count|larger than"):
        parse_count(text)


@given(st.integers(0, 10**18))
def test_every_int_is_itself_as_number_and_as_text(count):
    assert parse_count(count) == parse_count(str(count)) == count


@given(st.integers(0, 999_999), st.sampled_from("KMBT"))
def test_decimals_are_exact(thousandths, suffix):
    exact = thousandths * {"K": 1, "M": 10**3, "B": 10**6, "T": 10**9}[suffix]
    assert parse_count(f"{thousandths // 1000}.{thousandths % 1000:03}{suffix}") == exact


@given(st.integers(1, 10**15 - 1))
def test_formatting_keeps_four_digits(count):
    text = format_count(count)
    assert len(text) <= 7
    assert float(text.rstrip("KMBT")) * {"K": 1e3, "M": 1e6, "B": 1e9, "T": 1e12}.get(text[-1], 1) == pytest.approx(
        count, rel=5.1e-4
    )


@pytest.mark.parametrize(
    ("count", "text"),
    [(512, "512"), (4_718_592, "4.719M"), (999_999, "1M"), (15_628_775_424, "15.63B"), (10**12, "1T")],
)
def test_formats(count, text):
    assert format_count(count) == text


@pytest.mark.parametrize(
    ("value", "span"),
    [
        (100, {"steps": 100}),
        (0, {"steps": 0}),
        (0.05, {"fraction": 0.05}),
        (1.0, {"fraction": 1.0}),
        ("16B", {"tokens": "16B"}),
        ("16e9K", {"tokens": "16e9K"}),
        ({"tokens": 1e9}, {"tokens": 1e9}),
        ({"steps": 3}, {"steps": 3}),
    ],
)
def test_spans_have_one_reading(value, span):
    assert parse_span(value) == span


@pytest.mark.parametrize("value", ["2e3", 2e3, "2000.0", 1.5])
def test_a_number_that_could_be_steps_or_tokens_is_refused_with_both_readings(value):
    with pytest.raises(ValueError, match=rf"write {float(value):.0f} for steps, {{tokens: {value}}} for tokens"):
        parse_span(value)


@pytest.mark.parametrize("value", ["100", True, None])
def test_a_quoted_number_is_neither_steps_nor_tokens(value):
    with pytest.raises(ValueError, match=re.escape("steps (100), tokens (16B) or a fraction")):
        parse_span(value)


@pytest.mark.parametrize("text", ["300B", "2.5M", "1e9", "800k"])
def test_the_schema_takes_what_the_parser_takes(text):
    pattern = next(option["pattern"] for option in COUNT_SCHEMA["anyOf"] if "pattern" in option)
    assert re.search(pattern, text)


def test_home_and_variables_are_expanded_in_paths(run_data, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("SCRATCH", "/scratch/me")
    run_data |= {"output": "~/runs/a", "tokenizer": "huggingface:~/tok", "init": {"from": "${SCRATCH}/base"}}
    run_data["sources"]["web"]["path"] = ["$SCRATCH/web-*", "s3://bucket/web", "/plain"]
    run_data["validation"] = {"sources": {"web": "$SCRATCH/val"}}
    config = draft_config(run_data, ["output=~/runs/b"]).finish("run.yaml")
    assert config.output == "/home/me/runs/b"
    assert config.tokenizer == "huggingface:/home/me/tok"
    assert config.init.from_ == "/scratch/me/base"
    assert config.sources["web"].paths == ["/scratch/me/web-*", "s3://bucket/web", "/plain"]
    assert config.validation.sources == {"web": "/scratch/me/val"}


def test_a_variable_that_is_not_set_is_named(run_data, monkeypatch):
    monkeypatch.delenv("SCRATCH", raising=False)
    problems = draft_config(run_data, ["output=$SCRATCH/a", "sources.web.path=~nobody-here/web"]).problems
    assert [problem.partition("; ")[0] for problem in sorted(problems)] == [
        'output: "$SCRATCH/a": the variable SCRATCH is not set in the environment',
        'sources.web.path: "~nobody-here/web": ~nobody-here has no home directory',
    ]


@pytest.mark.parametrize(
    ("num_bytes", "text"),
    [
        (0, "0 bytes"),
        (999, "999 bytes"),
        (1000, "1 KB"),
        (3_282_000, "3.28 MB"),
        (999_600_000, "1 GB"),
        (33.2e9, "33.2 GB"),
        (2e12, "2 TB"),
    ],
)
def test_sizes_have_the_unit_that_shows_them(num_bytes, text):
    assert format_bytes(num_bytes) == text


def test_a_count_and_its_noun_agree():
    assert [format_number_of(n, "rank") for n in (0, 1, 2, 1024)] == ["0 ranks", "1 rank", "2 ranks", "1,024 ranks"]
    assert [format_number_of(n, "micro-batch") for n in (1, 2)] == ["1 micro-batch", "2 micro-batches"]


def test_other_forms_of_a_shell_are_refused_and_a_price_is_no_variable(run_data, monkeypatch):
    """`${SCRATCH:-/tmp}/a` was the name of a folder."""
    monkeypatch.setenv("SCRATCH", "/scratch")
    for path in ("${SCRATCH:-/tmp}/a", "${SCRATCH/a", "${}/a"):
        (problem,) = draft_config(run_data, [f"output={path}"]).problems
        assert "only $NAME and ${NAME} are expanded" in problem
    assert draft_config(run_data, ["output=/books/$5/a$"]).finish("run.yaml").output == "/books/$5/a$"
