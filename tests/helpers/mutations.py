"""Mutations of valid files: bytes, numbers, and the structure of JSON, JSON Lines and YAML."""

from __future__ import annotations

import copy
import json
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import yaml
from hypothesis import strategies as st

_NUMBERS = (
    *(
        b"0",
        b"-1",
        b"1",
        b"255",
        b"65536",
        b"2147483648",
        b"4294967295",
        b"9223372036854775807",
        b"18446744073709551616",
    ),
    *(
        b"1e7",
        b"1e308",
        b"1e999",
        b"-1e9",
        b"0.5",
        b"NaN",
        b"Infinity",
        b".inf",
        b"010",
        b"1_000",
        b"1:30",
        b"9" * 5000,
    ),
)
_TEXTS = (
    *("", "\0", "a\0b", "\ud800", "\x1b[31m", "x" * 300, "../../etc/passwd", "/dev/zero", "null", "~", "$HOME", "*"),
    *("s3://a/b", "step-00000099", "\u202e", "[bold]", "{}", "%s", "huggingface:", "ffffffffffffffff"),
)
_VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 2**31, 2**63 - 1, 2**63, 10**30, 1e308, float("nan"), float("inf"), -0.5, 1e-320),
    *([], {}, [[]], {"": {}}, [None], {"a": 1}, [0] * 1000, *_TEXTS),
)
_YAML = (
    b"!!int ''",
    b"!!python/name:os.system ''",
    b"&a [*a]",
    b"<<: {a: 1}",
    b"? [a]\n: 1",
    b"{",
    b"- - -",
    b"|\n  x",
    b"%TAG ! x",
)


@dataclass(frozen=True)
class Mutation:
    """One change of a file; the numbers choose place and value, so that smaller ones make a simpler change."""

    kind: str
    place: int
    value: int

    def apply(self, content: bytes, others: Sequence[bytes]) -> bytes:
        """Return the changed content.

        Args:
            others: other files of the format, of which parts may be taken.
        """
        return _KINDS[self.kind](content, random.Random(f"{self.place} {self.value}"), others)


def _at(content: bytes, rng: random.Random) -> int:
    return rng.randrange(len(content) + 1)


def _flip(content: bytes, rng: random.Random, _: Sequence[bytes]) -> bytes:
    changed = bytearray(content or b"\0")
    changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def _set_bytes(content: bytes, rng: random.Random, _: Sequence[bytes]) -> bytes:
    at = _at(content, rng)
    width = rng.choice((1, 2, 4, 8))
    return content[:at] + rng.choice((b"\0", b"\xff", b"\x7f", b"\x80")) * width + content[at + width :]


def _cut(content: bytes, rng: random.Random, _: Sequence[bytes]) -> bytes:
    return content[: _at(content, rng)]


def _delete(content: bytes, rng: random.Random, _: Sequence[bytes]) -> bytes:
    at = _at(content, rng)
    return content[:at] + content[at + rng.choice((1, 4, 16, 200)) :]


def _repeat(content: bytes, rng: random.Random, _: Sequence[bytes]) -> bytes:
    at = _at(content, rng)
    return content[:at] + content[at : at + rng.choice((1, 8, 64, 1000))] * rng.choice((2, 3, 100)) + content[at:]


def _splice(content: bytes, rng: random.Random, others: Sequence[bytes]) -> bytes:
    other = rng.choice(others)
    return content[: _at(content, rng)] + other[_at(other, rng) :]


def _number(content: bytes, rng: random.Random, _: Sequence[bytes]) -> bytes:
    found = list(re.finditer(rb"-?[0-9][0-9.eE+-]*", content))
    if not found:
        return _flip(content, rng, ())
    match = rng.choice(found)
    return content[: match.start()] + rng.choice(_NUMBERS) + content[match.end() :]


def _insert(content: bytes, rng: random.Random, _: Sequence[bytes]) -> bytes:
    at = _at(content, rng)
    texts = [*_YAML, *(text.encode("utf-8", "surrogatepass") for text in _TEXTS), rb"\ud800", b"\xff\xfe", b"[" * 3000]
    return content[:at] + rng.choice(texts) + content[at:]


def _change_tree(tree: Any, rng: random.Random) -> Any:
    """Replace, remove, duplicate or rename one entry of nested lists and mappings."""
    holder, path = tree, []
    while isinstance(holder, dict | list) and holder and (not path or rng.random() < 0.75):
        key = rng.choice(list(holder)) if isinstance(holder, dict) else rng.randrange(len(holder))
        path.append((holder, key))
        holder = holder[key]
    if not path:
        return copy.deepcopy(rng.choice(_VALUES))
    holder, key = path[-1]
    action = rng.randrange(6)
    if action == 0:
        del holder[key]
    elif action == 1 and isinstance(holder, dict):
        holder[rng.choice(_TEXTS)] = holder.pop(key)
    elif action == 2 and isinstance(holder, list):
        holder.extend([copy.deepcopy(holder[key])] * rng.choice((1, 50)))
    elif action == 3 and len(path) > 1:
        holder[key] = copy.deepcopy(path[0][0][path[0][1]])
    else:
        holder[key] = copy.deepcopy(rng.choice(_VALUES))
    return tree


def _json(content: bytes, rng: random.Random, _: Sequence[bytes]) -> bytes:
    """Change one JSON value; in JSON Lines one line, and in a file with a JSON header the header."""
    for start in (0, 8):
        try:
            changed = json.dumps(_change_tree(json.loads(content[start:]), rng), ensure_ascii=rng.random() < 0.9)
            return content[:start] + changed.encode("utf-8", "surrogatepass")
        except (ValueError, RecursionError):
            continue
    lines = content.splitlines()
    try:
        number = rng.randrange(len(lines))
        lines[number] = json.dumps(_change_tree(json.loads(lines[number]), rng)).encode()
        return b"\n".join(lines) + b"\n"
    except (ValueError, RecursionError):
        return _number(content, rng, ())


def _yaml(content: bytes, rng: random.Random, _: Sequence[bytes]) -> bytes:
    try:
        tree = _change_tree(yaml.safe_load(content.decode()), rng)
        return bytes(yaml.safe_dump(tree, sort_keys=False, allow_unicode=rng.random() < 0.5), "utf-8", "surrogatepass")
    except (ValueError, yaml.YAMLError, RecursionError, TypeError):
        return _insert(content, rng, ())


_KINDS: dict[str, Callable[[bytes, random.Random, Sequence[bytes]], bytes]] = {
    **{"flip": _flip, "set": _set_bytes, "cut": _cut, "delete": _delete, "repeat": _repeat, "splice": _splice},
    **{"number": _number, "insert": _insert, "json": _json, "yaml": _yaml},
}
_BYTES = ("flip", "set", "cut", "delete", "repeat", "splice")


def mutations(*, is_yaml: bool = False, is_json: bool = False) -> st.SearchStrategy[list[Mutation]]:
    """Return a strategy of one to three changes that suit a format."""
    structured = ["yaml"] * 6 * is_yaml + ["json"] * 6 * is_json + ["number", "insert"] * (is_yaml or is_json)
    kinds = st.sampled_from([*structured, *_BYTES])
    place = st.integers(0, 2**20)
    return st.lists(st.builds(Mutation, kinds, place, place), min_size=1, max_size=3)
