"""A report as one HTML file that loads nothing: styles, scripts and numbers are inside it.

Its content security policy names the hashes of its own scripts and styles and forbids everything else. So even text
that escaped the escaping below would not be executed.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterator
from functools import cache
from html import escape
from importlib import resources
from typing import Any

import orjson

from megatron_cpt import __version__
from megatron_cpt.report.page import ChangeChart, CurveChart, DataTable, PageSection, RunPage, plain_text
from megatron_cpt.report.svg import NUM_COLORS, change_svg, curve_style, curve_svg, marker

UPLOT_VERSION = "1.6.32"
_LONG_TEXT = 40  # characters
_ASSETS = resources.files("megatron_cpt.report") / "assets"


def html_page(page: RunPage, *, version: str = "") -> str:
    """Return the HTML of a report.

    Args:
        page: its content.
        version: of a served page, which reloads when the server has another one.
    """
    style = _asset("uplot.min.css") + _asset("report.css")
    scripts = [f"/*\n{_asset('uplot.LICENSE')}*/\n{_asset('uplot.min.js')}", _asset("report.js")]
    if version:
        scripts.append(_asset("live.js"))
    connect = "connect-src 'self'; " if version else ""
    policy = (
        f"default-src 'none'; style-src {_hash(style)}; script-src {' '.join(map(_hash, scripts))}; {connect}"
        "base-uri 'none'; form-action 'none'"
    )
    return "".join(
        [
            '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n',
            f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n',
            '<meta name="viewport" content="width=device-width, initial-scale=1">\n',
            '<meta name="color-scheme" content="light dark">\n<meta name="referrer" content="no-referrer">\n',
            f"<title>{_safe(page.title)}: report</title>\n<style>{style}</style>\n</head>\n",
            f'<body data-version="{_safe(version)}">\n',
            *_body(page),
            f'<script type="application/json" id="report-data">{_embedded(_data(page))}</script>\n',
            *(f"<script>{script}</script>\n" for script in scripts),
            "</body>\n</html>\n",
        ]
    )


def _body(page: RunPage) -> Iterator[str]:
    yield f"<header><h1>{_safe(page.title)}</h1><p>{_safe(page.subtitle)}</p></header>\n"
    links = "".join(f'<a href="#{section.key}">{_safe(section.title)}</a>' for section in page.sections)
    yield f'<nav aria-label="Sections">{links}</nav>\n<main>\n'
    yield '<section id="summary"><h2>Summary</h2><ul>'
    for sentence in page.summary:
        topic, colon, rest = sentence.partition(": ")
        short = colon and len(topic) <= 40
        yield f"<li>{f'<b>{_safe(topic)}:</b> {_safe(rest)}' if short else _safe(sentence)}</li>"
    yield "</ul></section>\n"
    for section in page.sections:
        yield from _section(section)
    made_with = f"megatron-cpt {__version__}. Charts: uPlot {UPLOT_VERSION} (MIT). This page loads nothing."
    yield f"</main>\n<footer>{made_with}</footer>\n"


def _section(section: PageSection) -> Iterator[str]:
    yield f'<section id="{section.key}"><h2>{_safe(section.title)}</h2>'
    for sentence in section.sentences:
        yield f"<p>{_safe(sentence)}</p>"
    for part in section.parts:
        if isinstance(part, DataTable):
            yield from _table(part)
        else:
            yield from _figure(part)
    yield "</section>\n"


def _table(table: DataTable) -> Iterator[str]:
    label = _safe(table.title)
    yield f'<div class="table" role="region" tabindex="0" aria-label="{label}"><table><caption>{label}</caption>'
    yield "<thead><tr>"
    kinds = _kinds(table)
    for kind, header in zip(kinds, table.headers, strict=True):
        yield f'<th scope="col"{kind}>{_safe(header)}</th>'
    yield "</tr></thead><tbody>"
    for row in table.rows:
        yield f'<tr><th scope="row">{_safe(row[0])}</th>'
        for kind, cell in zip(kinds[1:], row[1:], strict=True):
            yield f"<td{kind}>{_safe(cell)}</td>"
        yield "</tr>"
    yield "</tbody></table></div>"
    if table.note:
        yield f'<p class="note">{_safe(table.note)}</p>'


def _kinds(table: DataTable) -> list[str]:
    """Return the attribute of the cells of each column; long texts, such as digests, may break anywhere."""
    longest = [max((len(row[place]) for row in table.rows), default=0) for place in range(len(table.headers))]
    kinds = ["text long" if length > _LONG_TEXT else "text" for length in longest]
    return [
        f' class="{kind}"' if place in table.text_columns else "" if place else ' class="first"'
        for place, kind in enumerate(kinds)
    ]


def _figure(chart: CurveChart | ChangeChart) -> Iterator[str]:
    unit = f", {_safe(chart.unit)}" if chart.unit else ""
    if isinstance(chart, CurveChart):
        key, labels, content = f' data-chart="{_safe(chart.key)}"', [c.label for c in chart.curves], curve_svg(chart)
    else:
        key, labels, content = "", list(chart.changes), change_svg(chart)
    yield f"<figure{key}><figcaption><b>{_safe(chart.title)}</b>{unit}</figcaption>"
    yield '<ul class="legend">'
    for place, label in enumerate(labels):
        color, dashes = curve_style(place, may_coincide=isinstance(chart, CurveChart) and chart.may_coincide)
        dash = f' stroke-dasharray="{dashes}"' if dashes else ""
        sample = f'<path class="curve c{color}"{dash} d="M0 6H28"/>' if key else marker(place, 14, 6)
        yield f'<li><svg viewBox="0 0 28 12" aria-hidden="true">{sample}</svg><span>{_safe(label)}</span></li>'
    yield f"</ul>{content}</figure>\n"


def _data(page: RunPage) -> dict[str, Any]:
    """Return the numbers of the page: figures of the runs, and the curves of all charts."""
    parts = [part for section in page.sections for part in section.parts]
    charts = {
        chart.key: {
            "steps": list(chart.steps),
            "curves": [
                {
                    "label": curve.label,
                    "values": list(curve.values),
                    "errors": list(curve.errors) if curve.errors else None,
                    "color": color,
                    "dashes": [int(length) for length in dashes.split()],
                }
                for place, curve in enumerate(chart.curves)
                for color, dashes in [curve_style(place, may_coincide=chart.may_coincide)]
            ],
            "switches": [list(switch) for switch in chart.switches],
            "flags": [list(flag) for flag in chart.flags],
            "has_points": chart.has_points,
        }
        for chart in parts
        if isinstance(chart, CurveChart)
    }
    return {**page.data, "summary": list(page.summary), "charts": charts, "num_colors": NUM_COLORS}


def _embedded(data: Any) -> str:
    """Return JSON that no content can end early: `</script>` becomes `\\u003c/script>`."""
    text = orjson.dumps(_clean(data)).decode()
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _clean(value: Any) -> Any:
    if isinstance(value, dict):
        return {plain_text(key): _clean(one) for key, one in value.items()}
    if isinstance(value, list):
        return [_clean(one) if isinstance(one, dict | list | str) else one for one in value]
    return plain_text(value) if isinstance(value, str) else value


def _safe(text: str) -> str:
    return escape(plain_text(text), quote=True)


def _hash(content: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}'"


@cache
def _asset(name: str) -> str:
    return (_ASSETS / name).read_text(encoding="utf-8")
