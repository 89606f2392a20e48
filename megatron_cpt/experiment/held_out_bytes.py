"""Bytes of text behind the tokens of held-out sources, for losses in bits per byte."""

from __future__ import annotations

import math

from megatron_cpt.config import RunConfig
from megatron_cpt.data.tokenfile.documents import document_blocks
from megatron_cpt.data.tokenfile.reader import expand_prefixes, open_with_one_dtype
from megatron_cpt.data.tokenizers.tokenizer import Tokenizer, load_tokenizer
from megatron_cpt.errors import UserError


def bits_per_byte_scales(config: RunConfig) -> dict[str, float]:
    """Return per held-out source the factor from nats per token to bits per byte: tokens / bytes / ln 2.

    Tokens and bytes are counted over the complete source; the end-of-document token counts as a token without bytes.
    Validation over a part of the source therefore gives an estimate, with the same factor for every arm.

    Raises:
        UserError: the run names no tokenizer, or a source has no text.
    """
    if config.validation is None:
        return {}
    if config.tokenizer is None:
        raise UserError("unit: bits_per_byte needs `tokenizer` in the base's run.yaml, to count the bytes of the text")
    tokenizer = load_tokenizer(config.tokenizer)
    return {name: _scale(name, path, tokenizer) for name, path in config.validation.sources.items()}


def _scale(name: str, path: str | list[str], tokenizer: Tokenizer) -> float:
    num_tokens = num_bytes = 0
    for dataset in open_with_one_dtype(expand_prefixes(path)):
        for block in document_blocks(dataset):
            for index in range(block.num_documents):
                ids = block.document(index).tolist()
                num_tokens += len(ids)
                text = tokenizer.decode([one for one in ids if one != tokenizer.eod_id])
                num_bytes += len(text.encode(errors="replace"))
        dataset.close()
    if not num_bytes:
        raise UserError(f"validation.sources.{name}: no text in it, so its loss has no value in bits per byte")
    return num_tokens / num_bytes / math.log(2)
