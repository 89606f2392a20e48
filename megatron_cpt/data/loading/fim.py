"""Fill in the middle: pieces of documents with their middle moved to the end, so that a model learns to fill gaps.

Bavarian et al., *Efficient Training of Language Models to Fill in the Middle* (arXiv 2207.14255). A piece is what a
sample holds of one document. Some of the pieces are cut at two places into prefix, middle and suffix, and become one of

    PSM    <prefix> prefix <suffix> suffix <middle> middle
    SPM    <prefix> <suffix> suffix <middle> prefix middle        (the paper's second variant)

on the level of tokens. As in Megatron-LM's FIM data set the sample keeps its length: what the added tokens push out at
its end is not trained on. Nothing ever gets shorter, so there is nothing to pad.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from megatron_cpt.errors import UserError

if TYPE_CHECKING:
    from megatron_cpt.config import FimConfig

_DRAWS = 4  # numbers a piece: whether, which order, two cuts


@dataclass(frozen=True)
class FillInMiddle:
    """How the samples of a source are rearranged.

    Attributes:
        rate: share of the pieces that are.
        spm_rate: share of those that become SPM; the others become PSM.
        prefix_id: the token that announces the prefix.
        middle_id: the middle.
        suffix_id: the suffix.
        eod_id: the token that ends a document; it stays where its piece ends.
    """

    rate: float
    spm_rate: float
    prefix_id: int
    middle_id: int
    suffix_id: int
    eod_id: int

    @property
    def dtype(self) -> np.dtype[Any]:
        """Holds the ids that are added."""
        return np.min_scalar_type(max(self.prefix_id, self.middle_id, self.suffix_id))

    def apply(self, tokens: npt.NDArray[Any], key: int) -> npt.NDArray[Any]:
        """Rearrange a sample.

        Args:
            tokens: any integer type.
            key: 64 bits that decide it all: the same tokens and key are the same sample on every machine.

        Returns:
            as many tokens, in the type of `tokens` or, where the added ids do not fit it, a wider one.
        """
        ends = np.flatnonzero(tokens == self.eod_id)
        starts = np.concatenate([[0], ends + 1])
        # of a bit generator numpy guarantees the raw numbers for ever, of a Generator's methods it does not
        draws = np.random.Philox(key=key).random_raw(_DRAWS * len(starts)).reshape(-1, _DRAWS)
        chosen = draws[:, 0] < self.rate * 2.0**64
        if not chosen.any():
            return tokens
        parts: list[npt.ArrayLike] = []
        for start, end, is_chosen, draw in zip(starts, [*ends, len(tokens)], chosen, draws.tolist(), strict=True):
            piece = tokens[start:end]
            parts += self._rearranged(piece, draw) if is_chosen and len(piece) else [piece]
            parts.append(tokens[end : end + 1])  # the end of the document; nothing after the last piece
        dtype = np.promote_types(tokens.dtype, self.dtype)
        return np.concatenate(parts, dtype=dtype, casting="unsafe")[: len(tokens)]  # every id fits

    def _rearranged(self, piece: npt.NDArray[Any], draw: list[int]) -> Iterator[npt.ArrayLike]:
        # a cut may be at either end, and both at one place: each part may be empty
        first, second = sorted(number % (len(piece) + 1) for number in draw[2:])
        prefix, middle, suffix = piece[:first], piece[first:second], piece[second:]
        if draw[1] < self.spm_rate * 2.0**64:
            yield from ([self.prefix_id, self.suffix_id], suffix, [self.middle_id], prefix, middle)
        else:
            yield from ([self.prefix_id], prefix, [self.suffix_id], suffix, [self.middle_id], middle)


def fill_in_middle(source: str, config: FimConfig | None, eod_id: int | None) -> FillInMiddle | None:
    """What run.yaml asks for; None where it asks for nothing.

    Raises:
        UserError: the id that ends a document is not known, or is one of the others.
    """
    if config is None:
        return None
    if eod_id is None:
        raise UserError(f"sources.{source}.fim: the tokenizer has no end-of-document token; set documents.eod_id")
    if eod_id in (config.prefix_id, config.middle_id, config.suffix_id):
        raise UserError(
            f"sources.{source}.fim: {eod_id} is the end-of-document id of the data; give a token of its own"
        )
    return FillInMiddle(**config.model_dump(), eod_id=eod_id)
