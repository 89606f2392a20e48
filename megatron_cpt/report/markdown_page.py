"""A report as Markdown for a pull request: the summary and the tables, without charts."""

from __future__ import annotations

import re
from collections.abc import Iterator

from megatron_cpt.report.page import ChangeChart, CurveChart, DataTable, RunPage, plain_text

MAX_ROWS = 40
"""Rows of a table: a comment on GitHub has at most 65,536 characters."""


def markdown_page(page: RunPage) -> str:
    """Return the Markdown of a report."""
    return "\n".join(_lines(page)) + "\n"


def _lines(page: RunPage) -> Iterator[str]:
    yield f"# {_safe(page.title)}"
    yield ""
    yield _safe(page.subtitle)
    yield ""
    yield from (f"- {_safe(sentence)}" for sentence in page.summary)
    for section in page.sections:
        tables = [part for part in section.parts if isinstance(part, DataTable)]
        charts = [part for part in section.parts if isinstance(part, CurveChart | ChangeChart)]
        if not tables and not section.sentences:
            continue
        if not tables and charts:
            continue  # its sentences explain the charts
        yield from ("", f"## {_safe(section.title)}", "")
        yield from (f"{_safe(sentence)}  " for sentence in section.sentences)
        for table in tables:
            yield from _table(table)


def _table(table: DataTable) -> Iterator[str]:
    yield from ("", f"**{_safe(table.title)}**", "")
    yield _row(table.headers)
    yield _row(
        [":--" if not place or place in table.text_columns else "--:" for place in range(len(table.headers))], raw=True
    )
    yield from map(_row, table.rows[:MAX_ROWS])
    rest = len(table.rows) - MAX_ROWS
    if rest > 0:
        yield from ("", f"{rest:,} more rows are in the HTML report.")
    if table.note:
        yield from ("", _safe(table.note))


def _row(cells: object, *, raw: bool = False) -> str:
    assert isinstance(cells, list | tuple)
    return f"| {' | '.join(cell if raw else _safe(cell) for cell in cells)} |"


def _safe(text: str) -> str:
    """Escape what Markdown or HTML would take for markup."""
    return re.sub(r"([\\`*_\[\]<>|#&~@])", _escape, plain_text(text).strip())


def _escape(found: re.Match[str]) -> str:
    entities = {"<": "&lt;", ">": "&gt;", "&": "&amp;", "@": "&#64;"}  # @ would notify people
    return entities.get(found[1], f"\\{found[1]}")
