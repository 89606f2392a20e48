"""Problem of a plan, with the keys of run.yaml that it depends on."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Problem:
    """Message for the user.

    Attributes:
        text: key, value, reason and what to do, in one line.
        keys: dotted keys that the problem depends on. If one of them has a problem of its own, its value is a stand-in
            and this problem must not be reported.
    """

    text: str
    keys: tuple[str, ...]
