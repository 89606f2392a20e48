"""YAML with reasons: it holds the values whatever names and reasons contain, and no value is without a comment."""

from __future__ import annotations

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from megatron_cpt.config.yamlfile import parse_yaml
from megatron_cpt.recipe.commented_yaml import Reasoned, dump_commented, without_reasons
from tests.helpers.recipes import values_without_comment

_TEXT = st.text(st.characters(blacklist_categories=["Cs"], blacklist_characters="\0"), max_size=200)
_KEY = st.text(st.characters(blacklist_categories=["Cs"], blacklist_characters="\0"), min_size=1, max_size=100)
_SCALAR = _TEXT | st.integers(-(2**63) + 1, 2**63 - 1) | st.floats(allow_nan=False) | st.booleans() | st.none()
_VALUES = st.builds(Reasoned, _SCALAR | st.lists(_SCALAR, min_size=1, max_size=4), _TEXT.filter(str.strip))
_SECTIONS = st.dictionaries(_KEY, _VALUES, min_size=1, max_size=4)
_TREES = st.recursive(
    _SECTIONS,
    lambda inner: st.dictionaries(_KEY, _VALUES | inner | st.lists(inner, min_size=1, max_size=2), min_size=1),
    max_leaves=8,
)


@given(_TREES, _TEXT)
def test_the_text_holds_the_values_and_every_value_has_a_comment(tree: dict[str, Any], head: str) -> None:
    text = dump_commented(tree, f"head {head}")
    assert parse_yaml(text, "recipe") == without_reasons(tree)
    assert values_without_comment(text) == []


def test_a_reason_beside_and_one_above() -> None:
    long = "reason " * 16
    tree = {"a": Reasoned(1, "why"), "b": {"c": Reasoned([0.9, 0.95], long), "d": [{"e": Reasoned("x", long)}]}}
    above = f"# {long.strip()}"
    assert dump_commented(tree, "head") == (
        f"# head\n\na: 1  # why\n\nb:\n  {above}\n  c: [0.9, 0.95]\n  d:\n      {above}\n    - e: x\n"
    )


def test_a_line_feed_in_a_reason_does_not_end_the_comment() -> None:
    text = dump_commented({"a": Reasoned(1, "source web\noutput: /elsewhere\u2028b: 2")}, "head\nb: 3")
    assert parse_yaml(text, "recipe") == {"a": 1}
    assert r"source web\noutput: /elsewhere\u2028b: 2" in text
