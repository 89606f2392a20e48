"""Options with several values after one flag."""

from __future__ import annotations

import pytest

from megatron_cpt.cli.arguments import repeat_options
from megatron_cpt.errors import UserError


@pytest.mark.parametrize(
    ("written", "read"),
    [
        (
            "preprocess --input a b=1.jsonl c --output-prefix p",
            "preprocess --input a --input b=1.jsonl --input c --output-prefix p",
        ),
        ("preprocess --input a --append-eod --input b c", "preprocess --input a --append-eod --input b --input c"),
        ("preprocess --input=a --key k", "preprocess --input=a --key k"),
        ("preprocess --output-prefix p --input - a", "preprocess --output-prefix p --input - --input a"),
        ("train --allow blend data run.yaml seed=3", "train --allow blend --allow data run.yaml seed=3"),
        ("train run.yaml --allow blend data a.b=1 x", "train run.yaml --allow blend --allow data a.b=1 x"),
        ("train run.yml seed=3 --allow blend", "train run.yml seed=3 --allow blend"),
        ("plan run.yaml --allow a b", "plan run.yaml --allow a b"),
        ("preprocess --input a -- b", "preprocess --input a -- b"),
        ("--help", "--help"),
        ("", ""),
    ],
)
def test_each_value_gets_its_flag(written, read):
    assert repeat_options(written.split()) == read.split()


@pytest.mark.parametrize("written", ["preprocess --input", "preprocess --input --key k", "train run.yaml --allow"])
def test_a_flag_without_a_value(written):
    with pytest.raises(UserError, match="give at least one value"):
        repeat_options(written.split())
