"""The page in headless Chromium: it loads nothing, its charts open, and a curve can be hidden."""

from __future__ import annotations

import re

import orjson
import pytest

from megatron_cpt.report.write_report import write_report
from tests.helpers.chromium import find_chromium, visit
from tests.helpers.report_runs import training_line, write_run

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(find_chromium() is None, reason="no Chromium: apt-get install chromium"),
]

# Clicks in place of a reader, and what is then in the page.
CLICKS = """
<script>
  const figure = document.querySelector('figure[data-chart="loss-by-source"]');
  const buttons = [...figure.querySelectorAll("button")];
  const picture = () => figure.querySelector("canvas").toDataURL();
  const pictures = [picture()];
  const state = () => buttons.map((button) => button.textContent + button.ariaPressed).join(" ");
  const steps = [
    () => buttons[0].click(),
    () => pictures.push(picture()),
    () => buttons.at(-1).click(),
    () => pictures.push(picture()),
    () => document.body.append(`SEEN ${state()}, ${new Set(pictures).size} pictures`),
  ];
  steps.forEach((step, place) => setTimeout(step, 100 * place));
</script>
"""


@pytest.fixture
def page(tmp_path):
    one, two = (write_run(tmp_path / name, name=name) for name in ("one", "two"))
    return write_report(one, compare=[two], output=tmp_path / "page.html")


def test_the_page_asks_for_nothing_and_opens_its_charts(page, tmp_path):
    seen = visit(page, tmp_path / "profile")
    assert seen.hosts == []
    assert seen.console == ""
    charts = len(re.findall(r"<figure data-chart=", page.read_text()))
    assert len(re.findall(r'<figure data-chart="[^"]+" class="live">', seen.document)) == charts > 5
    assert seen.document.count("<canvas") == charts


def test_a_request_would_have_been_seen(tmp_path):
    (tmp_path / "page.html").write_text('<img src="http://tracker.example/pixel.png">')
    assert "tracker.example" in visit(tmp_path / "page.html", tmp_path / "profile").hosts


def test_a_foreign_script_is_refused_by_the_policy(page, tmp_path):
    text = page.read_text().replace("</body>", "<script>document.title = 'taken'</script></body>")
    (tmp_path / "changed.html").write_text(text)
    seen = visit(tmp_path / "changed.html", tmp_path / "profile")
    assert "<title>one: report</title>" in seen.document
    assert "violates the following Content Security Policy directive" in seen.console


def test_curves_can_be_hidden_and_the_scale_changed(page, tmp_path):
    text = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", page.read_text())
    (tmp_path / "clicks.html").write_text(text.replace("</body>", f"{CLICKS}</body>"))
    seen = visit(tmp_path / "clicks.html", tmp_path / "profile")
    assert "SEEN webfalse codetrue qatrue log scaletrue, 3 pictures" in seen.document


def test_a_report_of_a_million_lines_is_under_2_mb_and_opens(tmp_path):
    folder = write_run(tmp_path / "run")
    parts = orjson.dumps(training_line(160)).split(b"160", 1)
    with open(folder / "metrics.jsonl", "wb") as file:
        for step in range(1, 1_000_001):
            file.write(parts[0] + b"%d" % step + parts[1] + b"\n")
    page = write_report(folder)
    content = page.read_bytes()
    assert len(content) < 2_000_000
    assert write_report(folder).read_bytes() == content
    assert visit(page, tmp_path / "profile").document.count("<canvas") > 3
