"""Convert wiki markup to prose.

Templates, tables, references and files are dropped with their content; links and emphasis keep their words. A real
corpus needs a real parser; for the hundred articles of this demo, regular expressions save a dependency.
"""

from __future__ import annotations

import html
import re

# Each pattern forbids its own opening inside, so repeated substitution removes nested markup from the inside out.
TEMPLATE = re.compile(r"\{\{[^{}]*\}\}")
TABLE = re.compile(r"\{\|(?:(?!\{\||\|\}).)*\|\}", re.DOTALL)
MEDIA_LINK = re.compile(r"\[\[(?:File|Image|Category):[^\[\]]*(?:\[\[[^\[\]]*\]\][^\[\]]*)*\]\]", re.IGNORECASE)

COMMENT = re.compile(r"<!--.*?-->", re.DOTALL)
REFERENCE = re.compile(r"<ref\b[^>]*?/>|<ref\b[^>]*>.*?</ref>", re.DOTALL | re.IGNORECASE)
OPAQUE = re.compile(r"<(math|gallery|timeline|imagemap|code|score)\b[^>]*>.*?</\1>", re.DOTALL | re.IGNORECASE)
TAG = re.compile(r"</?[a-zA-Z][^<>\n]*>")
WIKI_LINK = re.compile(r"\[\[(?:[^\[\]|]*\|)?([^\[\]]*)\]\]")
WEB_LINK = re.compile(r"\[https?://\S+\s*([^\]]*)\]")
HEADING = re.compile(r"^=+\s*(.*?)\s*=+\s*$", re.MULTILINE)
EMPHASIS = re.compile(r"'{2,}")
LIST_MARK = re.compile(r"^[*#:;]+\s*", re.MULTILINE)
LEADING_COMMA = re.compile(r"\(\s*[,;][,;\s]*")  # remains of "({{IPA|...}}; born 1903)" without its template
EMPTY_BRACKETS = re.compile(r"\(\s*\)")
BLANK_LINES = re.compile(r"\n{3,}")

# Below these headings are lists of links and sources, not prose.
BACK_MATTER = re.compile(
    r"^=+\s*(?:references|notes|footnotes|external links|further reading|see also|bibliography|sources)\s*=+\s*$",
    re.MULTILINE | re.IGNORECASE,
)


def to_prose(markup: str) -> str:
    """Return the words of a page in wiki markup: headings and paragraphs, one per line."""
    back_matter = BACK_MATTER.search(markup)
    text = markup[: back_matter.start()] if back_matter else markup
    for pattern in (COMMENT, REFERENCE, OPAQUE):
        text = pattern.sub("", text)
    for pattern in (TEMPLATE, TABLE, MEDIA_LINK):
        text = _remove_nested(pattern, text)
    text = WIKI_LINK.sub(r"\1", text)
    text = WEB_LINK.sub(r"\1", text)
    text = HEADING.sub(r"\n\1\n", text)
    text = EMPHASIS.sub("", text)
    for pattern in (TAG, LIST_MARK):
        text = pattern.sub("", text)
    text = html.unescape(text)  # last: an escaped "<" is a character, not a tag
    text = EMPTY_BRACKETS.sub("", LEADING_COMMA.sub("(", text))
    text = "\n".join(" ".join(line.split()) for line in text.splitlines())
    return BLANK_LINES.sub("\n\n", text).strip()


def _remove_nested(pattern: re.Pattern[str], text: str) -> str:
    """Remove the innermost matches until none is left."""
    num_removed = 1
    while num_removed:
        text, num_removed = pattern.subn("", text)
    return text
