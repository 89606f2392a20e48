"""JSON objects from files that nobody vouches for: no key twice, every value checked before it is used."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_cpt.errors import RefusedError
from megatron_cpt.files.retry import is_path_error
from megatron_cpt.files.whole_io import read_file

_MAX_BYTES = 64_000_000  # config.json and the index; the index of a model with 1,000 layers is under 2 MB
_MAX_VALUES = 2_000_000  # a header has about 5 per tensor; files of the largest models have under 200,000 tensors
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")
_MAX_SIZE = 1 << 31  # larger sizes would overflow the shapes that are computed from them


def read_json_object(file: Path) -> dict[str, Any]:
    """Return the JSON object in a file.

    Raises:
        RefusedError: the file is missing or too large, or is not one JSON object with unique keys.
    """
    try:
        size = file.stat().st_size
        text = read_file(file) if size <= _MAX_BYTES else b""
    except OSError as error:
        if not is_path_error(error):
            raise
        raise RefusedError(f"{file}: cannot be read: {error.strerror}") from error
    if size > _MAX_BYTES:
        raise RefusedError(f"{file}: {size} bytes of JSON, above the limit of {_MAX_BYTES}; is it another file?")
    return parse_json_object(text, str(file))


def parse_json_object(text: bytes, name: str) -> dict[str, Any]:
    """Return the JSON object in a text; `name` says what the text is in a `RefusedError`."""
    if (count := text.count(b",")) > _MAX_VALUES:  # a comma in a name counts too; values without one nest too deeply
        raise RefusedError(f"{name}: {count:,} values, above the limit of {_MAX_VALUES:,}; is it another file?")

    def refuse_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) != len(pairs):
            ((key, _),) = Counter(key for key, _ in pairs).most_common(1)
            raise RefusedError(f"{name}: has {key} twice, so its meaning is unclear; remove one")
        return result

    try:
        value = json.loads(text.decode("utf-8"), object_pairs_hook=refuse_duplicates)
        if _SURROGATE.search(text):  # half of a pair is no text; a UnicodeEncodeError is a ValueError
            json.dumps(value, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        raise RefusedError(f"{name}: not JSON: {error}; is the download complete?") from error
    if not isinstance(value, dict):
        raise RefusedError(f"{name}: not a JSON object")
    return value


class HfConfig:
    """Values of a config.json, checked for their type when they are read, with the defaults of a family.

    A value that cannot be used adds a line to `problems`, and a placeholder is returned, so that one message can list
    all problems of a file.
    """

    def __init__(self, data: Mapping[str, Any], defaults: Mapping[str, Any]) -> None:
        self._data = {**defaults, **data}
        self.problems: list[str] = []

    def size(self, key: str) -> int:
        """Return a required positive integer."""
        value = self._data.get(key)
        if type(value) is int and 0 < value < _MAX_SIZE:
            return value
        self.problems.append(f"{key}: {value!r}; it must be a positive whole number")
        return 1

    def optional_size(self, key: str) -> int | None:
        """Return a positive integer, or None if the key is null or missing."""
        return None if self._data.get(key) is None else self.size(key)

    def number(self, key: str, within: Mapping[str, Any] | None = None) -> float:
        """Return a required number, from the config or from an object inside it."""
        value = (self._data if within is None else within).get(key)
        if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
            return float(value)
        self.problems.append(f"{key}: {value!r}; it must be a number")
        return 1.0

    def flag(self, key: str) -> bool:
        """Return a boolean; False if the key is null or missing."""
        value = self._data.get(key)
        if value is None or isinstance(value, bool):
            return bool(value)
        self.problems.append(f"{key}: {value!r}; it must be true or false")
        return False

    def get(self, key: str) -> Any:
        """Return the unchecked value, or None if the key is missing."""
        return self._data.get(key)
