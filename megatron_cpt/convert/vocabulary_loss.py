"""Loss of a model with new tokens on held-out text, under its old and its new tokenizer.

Losses per token cannot be compared: a token of the new vocabulary stands for more text. Bits per byte can, since both
tokenizers predict the same bytes. Example: 1,000 bytes are 400 old tokens of 2.1 nats and 350 new ones of 2.6 nats. The
sums are 840 and 910 nats, or 1.21 and 1.31 bits per byte.
"""

from __future__ import annotations

import functools
import math
import re
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.nn import functional

from megatron_cpt.checkpoint.loading.inference_model import open_checkpoint
from megatron_cpt.checkpoint.record import SavedRun
from megatron_cpt.convert.logits import map_logits
from megatron_cpt.convert.vocabulary import ExtendedVocabulary
from megatron_cpt.data.mining.texts import read_queries
from megatron_cpt.data.tokenizers.tokenizer import HuggingFaceTokenizer
from megatron_cpt.errors import UserError

MAX_BYTES = 100_000
"""Bytes of the text that are read, about 25,000 predictions of each tokenizer."""
_CHARACTERS = 1000


@dataclass(frozen=True)
class EncodedText:
    """Text in parts that are predicted on their own, each under two tokenizers.

    Attributes:
        before, after: ids of each part under the old and the new tokenizer. The first id is the start token, which is
            not predicted.
        num_bytes: bytes of all parts in UTF-8.
    """

    before: list[list[int]]
    after: list[list[int]]
    num_bytes: int


@dataclass(frozen=True)
class VocabularyLoss:
    """Loss on a text before and after new tokens.

    Attributes:
        num_bytes: bytes of the text.
        tokens_before, tokens_after: tokens of the text under the old and the new tokenizer.
        before: bits per byte of the model without the new rows; None if the old tokenizer gives ids without a row.
        after: bits per byte of the model with the new rows.
    """

    num_bytes: int
    tokens_before: int
    tokens_after: int
    before: float | None
    after: float

    def __str__(self) -> str:
        missing = "not defined, since the model had no row for some ids,"
        before = missing if self.before is None else f"{self.before:.4f}"
        return (
            f"{before} -> {self.after:.4f} bits per byte, on {self.num_bytes:,} bytes of text = "
            f"{self.tokens_before:,} -> {self.tokens_after:,} tokens"
        )


def encode_text(name: str, extended: ExtendedVocabulary) -> EncodedText:
    """Encode the first `MAX_BYTES` bytes of a text under both tokenizers.

    Args:
        name: prefix of a dataset under the old tokenizer, or text in a format of `preprocess` with the field `text`.

    Raises:
        UserError: the file is missing or has no text, or the tokenizer has no token that starts a text.
        RefusedError: the file is damaged, or the ids of a dataset are of another tokenizer.
    """
    old, new = (HuggingFaceTokenizer(folder) for folder in (extended.old_tokenizer, extended.new_tokenizer))
    start = old.bos_id if old.bos_id is not None else old.eod_id
    if start is None:
        raise UserError(
            "--loss-on: the tokenizer has no bos_token and no eos_token, so the first token of a text has no context; "
            "name one in tokenizer_config.json"
        )
    length = extended.source.model.max_positions or 2 * _CHARACTERS
    parts = _parts(
        read_queries([name], f"huggingface:{extended.old_tokenizer}", ("text",)), min(_CHARACTERS, length // 2)
    )
    num_bytes = sum(len(part.encode()) for part in parts)
    if not num_bytes:
        raise UserError(f"--loss-on {name}: has no text")
    before, after = ([[start, *ids] for ids in tokenizer.encode_batch(parts)] for tokenizer in (old, new))
    return EncodedText(before, after, num_bytes)


def measure_loss(checkpoint: Path, text: EncodedText, extended: ExtendedVocabulary) -> VocabularyLoss:
    """Compute the loss of an imported checkpoint on a text under both tokenizers, in this process and in fp32.

    The model before is the same model with a softmax over the old ids, since all other weights are unchanged.
    """
    saved = open_checkpoint(checkpoint)
    new_rows = torch.zeros(extended.source.model.vocab, dtype=torch.bool)
    new_rows[extended.report.before :] = new_rows[list(extended.new_ids)] = True
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # megatron-core's, of what is not installed
        before = _bits_per_byte(saved, text.before, ~new_rows, text.num_bytes)
        after = _bits_per_byte(saved, text.after, torch.ones_like(new_rows), text.num_bytes)
    assert after is not None, "the import gives every id of the new tokenizer a row"
    tokens_before, tokens_after = (sum(len(ids) - 1 for ids in parts) for parts in (text.before, text.after))
    return VocabularyLoss(text.num_bytes, tokens_before, tokens_after, before, after)


def _bits_per_byte(
    saved: SavedRun, parts: Sequence[Sequence[int]], allowed: torch.Tensor, num_bytes: int
) -> float | None:
    """Return the loss with a softmax over the allowed ids; None if another id occurs."""
    prompts = [torch.tensor(ids) for ids in parts]
    if not all(bool(allowed[ids[1:]].all()) for ids in prompts):
        return None
    return math.fsum(map_logits(saved, prompts, functools.partial(_nats, allowed=allowed))) / math.log(2) / num_bytes


def _nats(logits: torch.Tensor, ids: torch.Tensor, *, allowed: torch.Tensor) -> float:
    """Return the sum of the losses of ids[1:]; the softmax is over the allowed ids."""
    columns = logits[:-1, : len(allowed)].masked_fill(~allowed, -torch.inf)
    return float(functional.cross_entropy(columns.double(), ids[1:], reduction="sum"))


def _parts(texts: Iterable[str], characters: int) -> list[str]:
    """Return the texts in parts of at most that many characters, which end before a space where one is near."""
    parts: list[str] = []
    num_bytes = 0
    for text in texts:
        for part in re.findall(rf"(?s).{{1,{characters}}}(?=\s|$)|.{{1,{characters}}}", text):
            num_bytes += len(part.encode())
            if num_bytes > MAX_BYTES:
                return parts or [part]
            parts.append(part)
    return parts
