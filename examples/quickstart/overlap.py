"""Decontamination: drop training documents that share 13 words in a row with a held-out document.

A model that has read a held-out passage is rewarded for remembering it, and its held-out loss would mean nothing. The
rule comes from Brown et al. 2020 (arXiv 2005.14165, appendix C): lower-cased words, n-grams of 13, and a document that
shares one of them is dropped completely.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

NGRAM_WORDS = 13
WORD = re.compile(r"\w+")


def ngrams(text: str) -> Iterator[str]:
    """Yield the 13-grams of a text; a shorter text is one n-gram."""
    words = WORD.findall(text.lower())
    for start in range(max(1, len(words) - NGRAM_WORDS + 1)):
        yield " ".join(words[start : start + NGRAM_WORDS])


class HeldOutNgrams:
    """Set of all 13-grams of the held-out documents."""

    def __init__(self, held_out: Iterable[str]) -> None:
        self._ngrams = {ngram for text in held_out for ngram in ngrams(text)}
        self._ngrams.discard("")  # from a text without words

    def __len__(self) -> int:
        return len(self._ngrams)

    def overlaps(self, text: str) -> bool:
        """Return True if `text` shares a 13-gram with any held-out document."""
        return any(ngram in self._ngrams for ngram in ngrams(text))
