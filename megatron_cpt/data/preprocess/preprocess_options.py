"""Options of `preprocess`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from megatron_cpt.data.preprocess.inputs import BLOCK_BYTES, MAX_LINE_BYTES, Shard
from megatron_cpt.data.tokenizers.fast import Check, WhenFast

Progress = Callable[[int, int, int, int], None]
Notify = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class PreprocessOptions:
    """Everything about a `preprocess` run that has a default.

    Attributes:
        key: the text's key in each JSON object, or its parquet column. Several keys give one dataset per key,
            OUTPUT_PREFIX_KEY.
        append_eod: end each document with the tokenizer's end-of-document id.
        keep_empty: keep a text without tokens as a document without sequences, as Megatron-LM's tool does.
        workers: processes that encode. 1: this process does it. More: a script that calls `preprocess` needs the
            `if __name__ == "__main__"` guard. None: one per core, fewer for little input.
        shuffle: seed of a random order of the documents; None keeps the order of the input.
        split_tokens: write pairs of at most this many tokens, OUTPUT_PREFIX-00000 and so on; None writes one pair.
        shard: encode only this part of the input; `join_shards` makes one dataset of all parts.
        max_bad: give up at more bad lines than this, a number (100) or a share of all lines ("0.1%"); None: no limit.
        max_line_bytes: a longer line counts as bad and is never held in memory.
        block_bytes: approximate size of a block, the unit of work, of resuming and of sharding.
        fast_tokenizer: when to use gigatoken, see `plan_tokenizer`.
        tokenizer_check: how much of gigatoken's output is compared with the tokenizer's own library.
        prefixes: output prefix per key, instead of the names derived from OUTPUT_PREFIX.
        overwrite: replace a dataset that already exists.
        restart: discard the progress of an interrupted run and start from scratch.
        progress: called after each block with (input bytes done, input bytes in total, documents, tokens).
        notify: called with a sentence about each decision and each step that takes long.
    """

    key: str | Sequence[str] = "text"
    append_eod: bool = False
    keep_empty: bool = False
    workers: int | None = 1
    shuffle: int | None = None
    split_tokens: int | None = None
    shard: Shard | None = None
    max_bad: int | str | None = None
    max_line_bytes: int = MAX_LINE_BYTES
    block_bytes: int = BLOCK_BYTES
    fast_tokenizer: WhenFast = "auto"
    tokenizer_check: Check = "sample"
    prefixes: Sequence[str] | None = None
    overwrite: bool = False
    restart: bool = False
    progress: Progress | None = None
    notify: Notify = lambda text: None
