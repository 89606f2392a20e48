"""Fill-in-the-middle (FIM): move the middle of a text to its end, so that a model learns to fill gaps.

Bavarian et al., *Efficient Training of Language Models to Fill in the Middle* (arXiv 2207.14255). A piece is the part
of one document that a sample contains. A piece that is drawn is cut at two places into prefix, middle and suffix, and
becomes one of two orders of tokens:

    PSM (prefix, suffix, middle)    <prefix> prefix <suffix> suffix <middle> middle
    SPM (suffix, prefix, middle)    <prefix> <suffix> suffix <middle> prefix middle      (the paper's second variant)

Example: a b c d e f, cut after a b and after d, becomes in PSM order: <prefix> a b <suffix> e f <middle> c d.

As in Megatron-LM's FIM dataset, a sample keeps its length: the added tokens push others out at its end, and those are
not trained on.
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

_DRAWS = 4  # random numbers per piece: is it rearranged, in which order, first cut, second cut


@dataclass(frozen=True)
class FillInMiddle:
    """Fill-in-the-middle settings of a source.

    Attributes:
        rate: share of the pieces that are rearranged.
        spm_rate: share of the rearranged pieces in SPM order; the others are in PSM order.
        prefix_id: id of the token before the prefix; `middle_id` and `suffix_id` accordingly.
        eod_id: end-of-document id; it stays at the end of its piece.
    """

    rate: float
    spm_rate: float
    prefix_id: int
    middle_id: int
    suffix_id: int
    eod_id: int

    @property
    def dtype(self) -> np.dtype[Any]:
        """Smallest integer type that can hold the added ids."""
        return np.min_scalar_type(max(self.prefix_id, self.middle_id, self.suffix_id))

    def apply(self, tokens: npt.NDArray[Any], key: int) -> npt.NDArray[Any]:
        """Rearrange a sample.

        Args:
            tokens: ids of any integer type.
            key: 64-bit random key; equal tokens and keys give equal results on every machine.

        Returns:
            As many tokens, in the type of `tokens`, or in a wider one if the added ids need it.
        """
        ends = np.flatnonzero(tokens == self.eod_id)
        starts = np.concatenate([[0], ends + 1])
        # numpy keeps a bit generator's raw output stable across versions, but not the output of Generator's methods
        draws = np.random.Philox(key=key).random_raw(_DRAWS * len(starts)).reshape(-1, _DRAWS)
        chosen = draws[:, 0] < self.rate * 2.0**64
        if not chosen.any():
            return tokens
        parts: list[npt.ArrayLike] = []
        for start, end, is_chosen, draw in zip(starts, [*ends, len(tokens)], chosen, draws.tolist(), strict=True):
            piece = tokens[start:end]
            parts += self._rearranged(piece, draw) if is_chosen and len(piece) else [piece]
            parts.append(tokens[end : end + 1])  # the end-of-document token; empty after the last piece
        dtype = np.promote_types(tokens.dtype, self.dtype)
        return np.concatenate(parts, dtype=dtype, casting="unsafe")[: len(tokens)]  # the dtype holds every id

    def _rearranged(self, piece: npt.NDArray[Any], draw: list[int]) -> Iterator[npt.ArrayLike]:
        # each of the three parts may be empty
        first, second = sorted(number % (len(piece) + 1) for number in draw[2:])
        prefix, middle, suffix = piece[:first], piece[first:second], piece[second:]
        if draw[1] < self.spm_rate * 2.0**64:
            yield from ([self.prefix_id, self.suffix_id], suffix, [self.middle_id], prefix, middle)
        else:
            yield from ([self.prefix_id], prefix, [self.suffix_id], suffix, [self.middle_id], middle)


def fill_in_middle(source: str, config: FimConfig | None, eod_id: int | None) -> FillInMiddle | None:
    """Build the fill-in-the-middle settings of a source from run.yaml; None without a `fim` section.

    Raises:
        UserError: the end-of-document id is unknown, or equals one of the added ids.
    """
    if config is None:
        return None
    if eod_id is None:
        raise UserError(f"sources.{source}.fim: the tokenizer has no end-of-document token; set documents.eod_id")
    if eod_id in (config.prefix_id, config.middle_id, config.suffix_id):
        raise UserError(
            f"sources.{source}.fim: id {eod_id} is the end-of-document id of the data; choose another id for it"
        )
    return FillInMiddle(**config.model_dump(), eod_id=eod_id)
