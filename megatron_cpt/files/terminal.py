"""Text for terminals: control characters in names, paths and documents are shown, not executed.

Example: a source called `web\\x1b[2J` would clear the screen, and text after U+202E is shown from right to left.
"""

from __future__ import annotations

import contextlib
import re
import sys
from collections.abc import Iterator
from typing import Any, TextIO

# Control characters except tab and line feed, marks that change the direction of text, and halves of surrogate pairs.
_UNSAFE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def escape(text: str) -> str:
    """Return a text with every character that a terminal would execute as Python writes it, such as `\\x1b`.

    Those that JSON allows unescaped are written as `\\u007f`, which JSON allows too.
    """
    return _UNSAFE.sub(_escape_one, text)


def _escape_one(match: re.Match[str]) -> str:
    return f"\\u{ord(match[0]):04x}" if match[0] >= "\x7f" else ascii(match[0])[1:-1]


class EscapedStream:
    """Text stream that escapes everything written to it.

    Attributes:
        rich_proxied_file: the stream itself. rich, which writes escape sequences of its own, looks for this name; its
            consoles escape what they show, see `views/terminal_console.py`.
    """

    def __init__(self, stream: TextIO) -> None:
        self.rich_proxied_file = stream

    def write(self, text: str) -> int:
        """Write a text, escaped."""
        self.rich_proxied_file.write(escape(text))
        return len(text)

    def writelines(self, lines: Any) -> None:
        """Write several texts, escaped."""
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.rich_proxied_file, name)


@contextlib.contextmanager
def escaped_output() -> Iterator[None]:
    """Escape everything that `print` and logging write to stdout and stderr inside the block."""
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = EscapedStream(before[0]), EscapedStream(before[1])
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before
