"""Decontamination: no training document may share 13 words in a row with a held-out one.

A model that has read a held-out passage is rewarded for remembering it, and the table at the end would lie. The rule is
the usual one (Brown et al. 2020, arXiv 2005.14165, appendix C): lower-cased words, n-grams of 13, and a document that
shares even one of them is dropped whole.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

NGRAM_WORDS = 13
WORD = re.compile(r"\w+")


def ngrams(text: str) -> Iterator[str]:
    """Yields the 13-grams of a text; a text of fewer words is one n-gram of its own."""
    words = WORD.findall(text.lower())
    for start in range(max(1, len(words) - NGRAM_WORDS + 1)):
        yield " ".join(words[start : start + NGRAM_WORDS])


class HeldOutNgrams:
    """All 13-grams of the held-out documents, to test training documents against."""

    def __init__(self, held_out: Iterable[str]) -> None:
        self._ngrams = {ngram for text in held_out for ngram in ngrams(text)}
        self._ngrams.discard("")  # of a text without words

    def __len__(self) -> int:
        return len(self._ngrams)

    def overlaps(self, text: str) -> bool:
        """Returns whether `text` shares a 13-gram with any held-out document."""
        return any(ngram in self._ngrams for ngram in ngrams(text))
