"""Base class of the sections of run.yaml, and short forms: `300B` tokens, `16B` tokens of warmup, a time of `3h50m`."""

from __future__ import annotations

import os
import re
from decimal import Decimal
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, WithJsonSchema


class Section(BaseModel):
    """One section: frozen, without unknown keys or silent conversion of types."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        strict=True,  # "8" is not an int and "true" is not a bool; 1 is accepted where a float is expected
        allow_inf_nan=False,
        validate_by_name=False,
        use_attribute_docstrings=True,
    )


_SUFFIXES = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}
_COUNT = re.compile(r"([0-9][0-9_]*(?:\.[0-9]+)?(?:[eE]\+?[0-9]{1,2})?)\s*([KMBTkmbt]?)")
_NOT_A_COUNT = "not a count; write a number such as 300B, 2.5M, 1T or 1e9"
_MAX_COUNT = 10**18


def parse_count(value: Any) -> int:
    """Parse a count such as `300B`, `2.5M`, `1T`, `1e9` or a plain number; K, M, B and T are powers of 1,000.

    Raises:
        ValueError: if it is not a whole, non-negative count of at most 10^18.
    """
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise ValueError(_NOT_A_COUNT)
    match = _COUNT.fullmatch(str(value).strip())
    if not match:
        raise ValueError(_NOT_A_COUNT)
    digits, suffix = match.groups()
    # With Decimal 2.5M is exactly 2,500,000; with float 1.1B would have a fraction.
    count = Decimal(digits.replace("_", "")) * _SUFFIXES[suffix.upper()]
    if count > _MAX_COUNT:
        raise ValueError("larger than 10^18; choose a smaller count")
    if count != int(count):
        raise ValueError("not a whole count; remove the fraction")
    return int(count)


def format_count(count: float) -> str:
    """Format a count in short form, such as 300B, 1.57B, 4.72M or 512, with up to four digits."""
    for suffix in ("T", "B", "M", "K"):
        if count >= _SUFFIXES[suffix] * 0.99995:
            return f"{count / _SUFFIXES[suffix]:.4g}{suffix}"
    return f"{count:.4g}"


def format_bytes(num_bytes: float) -> str:
    """Format a size, such as 3.28 GB, 512 KB or 96 bytes; units are powers of 1,000."""
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("KB", 1e3)):
        if num_bytes >= size * 0.9995:
            return f"{num_bytes / size:.3g} {unit}"
    return f"{num_bytes:.0f} bytes"


def format_number_of(count: int, noun: str) -> str:
    """Return the count with its noun: "1 rank", "1,024 ranks", "2 micro-batches"."""
    if count == 1:
        return f"1 {noun}"
    return f"{count:,} {noun}{'es' if noun.endswith('ch') else 's'}"


def parse_span(value: Any) -> Any:
    """Expand the short form of a span.

    100 becomes {steps: 100}, `16B` {tokens: 16B} and 0.05 {fraction: 0.05}. A number such as 2e3 is neither: it looks
    like a count of steps, and elsewhere (`tokens: 1e9`) like a count of tokens.

    Raises:
        ValueError: if the value has none of these forms.
    """
    if isinstance(value, bool) or value is None or (isinstance(value, str) and value.strip().isdecimal()):
        raise ValueError("not a span; write steps (100), tokens (16B) or a fraction of the run (0.05)")
    if isinstance(value, int):
        return {"steps": value}
    if isinstance(value, float) and value <= 1.0:
        return {"fraction": value}
    if isinstance(value, float) or (isinstance(value, str) and _is_bare_number(value)):
        steps = f"{float(value):.0f}"
        raise ValueError(
            f"steps or tokens? write {steps} for steps, {{tokens: {value}}} for tokens, or a fraction of the run (0.05)"
        )
    return {"tokens": value} if isinstance(value, str) else value


def _is_bare_number(text: str) -> bool:
    match = _COUNT.fullmatch(text.strip())
    return match is not None and not match[2]


_VARIABLE = re.compile(r"\$(?:([A-Za-z_]\w*)|(\{[^}]*\}?))", re.ASCII)


def _value_of_variable(match: re.Match[str]) -> str:
    name = match[1] or match[2][1:-1]
    if match[2] and not (name.isidentifier() and match[2].endswith("}")):
        raise ValueError(f"{match[0]}: only $NAME and ${{NAME}} are expanded; write the path in full")
    if name not in os.environ:
        raise ValueError(f"the variable {name} is not set in the environment; set it, or write the path in full")
    return os.environ[name]


def expand_paths(value: Any) -> Any:
    """Expand `~` and `$NAME` in a path, in the paths of a list or dict, and after the colon of `KIND:PATH`.

    Raises:
        ValueError: a variable is not set, `${...}` holds more than a name, or there is no home directory.
    """
    if isinstance(value, list):
        return [expand_paths(path) for path in value]
    if isinstance(value, dict):
        return {name: expand_paths(path) for name, path in value.items()}
    if not isinstance(value, str):
        return value
    kind, colon, path = value.partition(":") if re.match(r"\w+:~", value) else ("", "", value)
    expanded = os.path.expanduser(_VARIABLE.sub(_value_of_variable, path))
    if expanded.startswith("~"):
        raise ValueError(f"{expanded.partition('/')[0]} has no home directory; write the path in full")
    return f"{kind}{colon}{expanded}"


COUNT_SCHEMA = {
    "anyOf": [{"type": "integer", "minimum": 0}, {"type": "number"}, {"type": "string", "pattern": _COUNT.pattern}],
    "description": "a count such as 300B, 2.5M, 1T, 1e9 or a plain number",
}

TokenCount = Annotated[int, BeforeValidator(parse_count), Field(gt=0), WithJsonSchema(COUNT_SCHEMA)]
"""Positive number of tokens."""


_SECONDS = {"d": 86400, "h": 3600, "m": 60, "s": 1}
_DURATION = re.compile(r"(?:(\d+)d)?(?:(\d+)h)?(?:(\d+)m)?(?:(\d+(?:\.\d+)?)s)?")
_MAX_SECONDS = 3650 * 86400.0
_NOT_A_DURATION = "not a time; write days, hours, minutes and seconds in this order (3h50m, 1d12h, 90s) or seconds"


def parse_duration(value: Any) -> float:
    """Return the seconds of a length of time such as `3h50m`, `1d12h`, `90s`, or a number of seconds.

    Raises:
        ValueError: if it has another form, is not above 0, or is longer than 10 years.
    """
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise ValueError(_NOT_A_DURATION)
    if isinstance(value, str):
        match = _DURATION.fullmatch(value.strip())
        if not match or not match.group(0):
            raise ValueError(_NOT_A_DURATION)
        seconds = sum(float(amount or 0) * unit for amount, unit in zip(match.groups(), _SECONDS.values(), strict=True))
    else:
        seconds = float(value)
    if not seconds > 0:
        raise ValueError("not above 0; choose a longer time")
    if not seconds <= _MAX_SECONDS:
        raise ValueError("longer than 10 years, which timers cannot count; write null for no limit")
    return seconds


def format_duration(seconds: float) -> str:
    """Format seconds for `parse_duration`: 13,800 becomes 3h50m, 90.5 becomes 1m30.5s."""
    text, rest = "", seconds
    for unit, size in _SECONDS.items():
        amount = rest if unit == "s" else rest // size
        rest -= amount * size
        text += f"{amount:g}{unit}" if amount else ""
    return text or "0s"


DURATION_SCHEMA = {
    "anyOf": [{"type": "number", "exclusiveMinimum": 0}, {"type": "string", "pattern": rf"^{_DURATION.pattern}$"}],
    "description": "a length of time such as 3h50m, 1d12h, 90s, or seconds",
}

Duration = Annotated[float, BeforeValidator(parse_duration), WithJsonSchema(DURATION_SCHEMA)]
"""Length of time in seconds."""
