"""The console that every table and progress bar is shown on."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from rich.console import Console
from rich.segment import Segment

from megatron_cpt.files.terminal import escape


class TerminalConsole(Console):
    """Console without markup and highlighting that escapes control characters in what it shows."""

    def __init__(self, **options: Any) -> None:
        super().__init__(markup=False, highlight=False, **options)
        # A progress bar puts a stream of rich's in the place of stderr, which hides from rich that ours escapes.
        self.file = self.file

    def render(self, *arguments: Any, **options: Any) -> Iterable[Segment]:
        """Return the segments of a renderable; rich's own control sequences are kept."""
        for segment in super().render(*arguments, **options):
            yield segment if segment.control else segment._replace(text=escape(segment.text))
