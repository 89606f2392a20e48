"""What a plan finds wrong, with the keys it was judged by."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Problem:
    """One line for the user: key, value, way out.

    Attributes:
        text: the line.
        keys: the dotted keys that it was judged by. Where one of them has a problem of its own the value was a
            stand-in, and this line would be a false alarm.
    """

    text: str
    keys: tuple[str, ...]
