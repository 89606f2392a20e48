"""New tokens for a continued run: rows of embedding and output layer that begin where the model can use them.

A row from random numbers is far from everything that the model has learned. A new token's rows begin as the mean of
the rows of the pieces that the old tokenizer makes of its text (what the model would have seen in its place), or as the
mean of all rows (Hewitt, *Initializing New Word Embeddings for Pretrained Language Models*, 2021).
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from megatron_cpt.config import ModelConfig
from megatron_cpt.convert.mapping.shapes import expected_tensors
from megatron_cpt.convert.mapping.tensors import EMBEDDING, OUTPUT_LAYER
from megatron_cpt.convert.megatron.torch_dist_plan import Form
from megatron_cpt.convert.source import SourceCheckpoint
from megatron_cpt.errors import RefusedError, UserError

_BLOCK_ROWS = 8192
_NEAR_ZERO = 0.05  # of the median norm of a row

Read = Callable[[str, int, int], torch.Tensor]


@dataclass(frozen=True)
class VocabularyReport:
    """What became of the vocabulary.

    Attributes:
        before, after: sizes.
        num_new: tokens that were added.
        from_pieces: of these, how many began from the pieces of the old tokenizer.
        known: tokens of the list that the tokenizer had already; left out.
        near_zero: rows of the old embedding with a norm under 5 % of the median: ids that were hardly trained.
        near_zero_ids: the first of them.
    """

    before: int
    after: int
    num_new: int
    from_pieces: int
    known: list[str]
    near_zero: int
    near_zero_ids: list[int]

    def __str__(self) -> str:
        known = f"; {len(self.known)} were known already" if self.known else ""
        ids = f" (ids {', '.join(map(str, self.near_zero_ids))}...)" if self.near_zero else ""
        return (
            f"{self.before:,} -> {self.after:,}: {self.num_new} new, {self.from_pieces} from their pieces{known}; "
            f"{self.near_zero} old rows are near zero{ids}"
        )


def read_new_tokens(file: Path) -> tuple[str, ...]:
    """One token a line, each once.

    Raises:
        UserError: the file cannot be read or is empty.
    """
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--add-tokens {file}: cannot be read ({error})") from error
    tokens = tuple(dict.fromkeys(line for line in lines if line))
    if not tokens:
        raise UserError(f"--add-tokens {file}: no tokens in it")
    return tokens


def extend_vocabulary(
    incoming: SourceCheckpoint, tokens: Sequence[str], init_rows: str, scratch: Path
) -> tuple[SourceCheckpoint, VocabularyReport]:
    """A model with rows for new tokens, and a tokenizer that knows them.

    Args:
        incoming: the model; its side files must have a tokenizer.
        tokens: the new ones.
        init_rows: `pieces` or `mean`.
        scratch: a folder for the old and the new tokenizer's files.

    Returns:
        The larger model, whose side files are the new tokenizer's.

    Raises:
        UserError: there is no tokenizer, or all tokens are known.
        RefusedError: the tokenizer cannot be loaded, or does not number new tokens one after the other.
    """
    tokenizer = _load_tokenizer(incoming, scratch / "old")
    vocab, vocabulary = incoming.model.vocab, tokenizer.get_vocab()
    known = [token for token in tokens if token in vocabulary]
    new = [token for token in tokens if token not in vocabulary]
    if not new:
        raise UserError("--add-tokens: the tokenizer knows all of them already")
    pieces = [tokenizer(token, add_special_tokens=False).input_ids if init_rows == "pieces" else [] for token in new]
    tokenizer.add_tokens(list(new))
    ids = [tokenizer.convert_tokens_to_ids(token) for token in new]
    first_id = ids[0]
    if ids != list(range(first_id, first_id + len(new))):
        raise RefusedError(f"--add-tokens: the tokenizer gives them the ids {ids[:8]}..., not one after the other")
    tokenizer.save_pretrained(scratch / "new")

    model = ModelConfig.model_validate({**incoming.model.model_dump(mode="json"), "vocab": max(vocab, ids[-1] + 1)})
    rows = {
        name: _new_rows(incoming.read, name, incoming.forms[name].shape[1], vocab, pieces)
        for name in (EMBEDDING, OUTPUT_LAYER)
        if name in incoming.forms
    }
    small, count = _near_zero(incoming.read, EMBEDDING, vocab)
    report = VocabularyReport(vocab, model.vocab, len(new), sum(bool(p) for p in pieces), known, count, small)
    shapes = expected_tensors(model)
    larger = replace(
        incoming,
        model=model,
        forms={name: Form(shapes[name], form.dtype) for name, form in incoming.forms.items()},
        read=_extended(incoming, rows, first_id),
        side_files={
            **incoming.side_files,
            **{file.name: file for file in sorted((scratch / "new").iterdir()) if file.is_file()},
        },
    )
    return larger, report


def _load_tokenizer(incoming: SourceCheckpoint, folder: Path) -> Any:
    """The tokenizer, from a copy of its files: in the Hugging Face cache they lie under other names."""
    if not any(name.startswith("tokenizer") for name in incoming.side_files):
        raise UserError("--add-tokens: the source has no tokenizer files (tokenizer.json, tokenizer_config.json)")
    folder.mkdir()
    for name, file in incoming.side_files.items():
        shutil.copyfile(file, folder / name)
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # transformers and tokenizers raise many kinds
        raise RefusedError(f"--add-tokens: the source's tokenizer cannot be loaded: {error}") from error


def _new_rows(read: Read, name: str, width: int, vocab: int, pieces: Sequence[Sequence[int]]) -> torch.Tensor:
    """(len(pieces), width) float32: the mean of each token's pieces, or of all rows."""
    if all(pieces):
        everything = torch.zeros(width)
    else:
        everything = torch.zeros(width, dtype=torch.float64)
        for first in range(0, vocab, _BLOCK_ROWS):
            everything += read(name, first, min(vocab, first + _BLOCK_ROWS)).double().sum(dim=0)
        everything = (everything / vocab).float()
    rows = [
        torch.stack([read(name, piece, piece + 1)[0].float() for piece in token]).mean(dim=0) if token else everything
        for token in pieces
    ]
    return torch.stack(rows)


def _near_zero(read: Read, name: str, vocab: int) -> tuple[list[int], int]:
    """The first ids of rows that are much shorter than the others, and how many there are."""
    norms = torch.cat(
        [
            read(name, first, min(vocab, first + _BLOCK_ROWS)).float().norm(dim=1)
            for first in range(0, vocab, _BLOCK_ROWS)
        ]
    )
    small = (norms < _NEAR_ZERO * norms.median()).nonzero().flatten()
    return small[:8].tolist(), len(small)


def _extended(incoming: SourceCheckpoint, rows: dict[str, torch.Tensor], first_id: int) -> Read:
    """Reads the old rows, and the new ones in their places; a tokenizer may be smaller than its model's embedding."""

    def read(name: str, first: int, last: int) -> torch.Tensor:
        if name not in rows:
            return incoming.read(name, first, last)
        form = incoming.forms[name]
        old = form.shape[0]
        out = torch.zeros((last - first, *form.shape[1:]), dtype=form.dtype)
        if first < old:
            out[: min(last, old) - first] = incoming.read(name, first, min(last, old))
        begin, end = max(first, first_id), min(last, first_id + len(rows[name]))
        if begin < end:
            out[begin - first : end - first] = rows[name][begin - first_id : end - first_id].to(form.dtype)
        return out

    return read
