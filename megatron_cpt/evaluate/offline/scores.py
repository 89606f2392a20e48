"""Metrics of the offline tasks, per question: bits per byte of the right answer first, then accuracies.

Bits per byte is -log2 of the probability of the right answer, divided by the answer's bytes without the blank before
it (as OLMo's in-loop evaluators count). Accuracies compare the choices by log-likelihood: raw (`acc`), per character
(`acc_norm`), per byte, per token, and minus the log-likelihood without the question (`acc_mutual_info`).
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from decimal import Decimal
from typing import Any

from megatron_cpt.evaluate.programs.code_execution import run_program

LogLikelihood = tuple[float, bool]
Scores = dict[str, float]

_count_tokens: ContextVar[Callable[[str], int] | None] = ContextVar("count_tokens", default=None)


@contextmanager
def token_counter(count_tokens: Callable[[str], int]) -> Iterator[None]:
    """Count tokens of answers inside the block, for `acc_tokens`; lm-eval tells a task no lengths.

    Args:
        count_tokens: answer with the blank before it -> number of tokens.
    """
    token = _count_tokens.set(count_tokens)
    try:
        yield
    finally:
        _count_tokens.reset(token)


def bits_per_byte(log_likelihood: float, answer: str) -> float:
    """Return -log2 of a probability per byte of the answer."""
    return -log_likelihood / math.log(2) / len(answer.encode())


def score_choices(doc: dict[str, Any], results: Sequence[LogLikelihood]) -> Scores:
    """Score the text of each choice; a second set of results is without the question."""
    choices, gold = doc["choices"], doc["gold"]
    given = [log_likelihood for log_likelihood, _ in results[: len(choices)]]
    scores = {
        "bits_per_byte": bits_per_byte(given[gold], choices[gold]),
        "acc": accuracy(given, gold),
        "acc_norm": accuracy(divide(given, [len(choice) for choice in choices]), gold),
        "acc_bytes": accuracy(divide(given, [len(choice.encode()) for choice in choices]), gold),
    }
    if (count_tokens := _count_tokens.get()) is not None:
        lengths = [count_tokens(f" {choice}") for choice in choices]
        scores["acc_tokens"] = accuracy(divide(given, lengths), gold)
    if len(results) == 2 * len(choices):
        alone = [log_likelihood for log_likelihood, _ in results[len(choices) :]]
        gained = [with_question - without for with_question, without in zip(given, alone, strict=True)]
        scores["acc_mutual_info"] = accuracy(gained, gold)
    return scores


def score_letters(doc: dict[str, Any], results: Sequence[LogLikelihood]) -> Scores:
    """Score the letters of lettered choices."""
    given = [log_likelihood for log_likelihood, _ in results]
    gold = doc["gold"]
    return {"bits_per_byte": bits_per_byte(given[gold], "A"), "acc": accuracy(given, gold)}


def score_answers(doc: dict[str, Any], results: Sequence[LogLikelihood]) -> Scores:
    """Score correct answers: the mean over all that are listed."""
    bits = [bits_per_byte(given, answer) for (given, _), answer in zip(results, doc["choices"], strict=True)]
    return {"bits_per_byte": sum(bits) / len(bits)}


def score_number(doc: dict[str, Any], results: Sequence[str]) -> Scores:
    """Compare the first number of the generated text with the answer, by value."""
    found = re.search(r"-?[\d,]*\.?\d+", results[0])
    return {
        "exact_match": float(found is not None and Decimal(found[0].replace(",", "")) == Decimal(doc["number"])),
    }


def score_program(doc: dict[str, Any], results: Sequence[str]) -> Scores:
    """Run the generated function with its tests."""
    return {"pass@1": float(run_program(f"{doc['prompt']}{results[0]}\n{doc['test']}").passed)}


def divide(values: Sequence[float], lengths: Sequence[int]) -> list[float]:
    """Return log-likelihoods per unit of length."""
    return [value / length for value, length in zip(values, lengths, strict=True)]


def accuracy(values: Sequence[float], gold: int) -> float:
    """Return 1 if the first of the largest values is the right choice."""
    return float(values.index(max(values)) == gold)
