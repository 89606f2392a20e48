"""New tokens for continued pretraining: initial rows of embedding and output layer.

Random rows would be unlike everything that the model has learned. Therefore the row of a new token is the mean of the
rows of the pieces that the old tokenizer splits it into (Gee et al., *Fast Vocabulary Transfer*, arXiv 2402.09977), or
the mean of all rows (Hewitt, *Initializing New Word Embeddings for Pretrained Language Models*, 2021). Example: the old
tokenizer splits "megatron" into ids 17 and 403, so its row is (row 17 + row 403) / 2.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import orjson
import torch

from megatron_cpt.config import ModelConfig
from megatron_cpt.convert.mapping.names import EMBEDDING, OUTPUT_LAYER
from megatron_cpt.convert.mapping.shapes import expected_tensors
from megatron_cpt.convert.megatron.torch_dist_plan import TensorSpec
from megatron_cpt.convert.side_files import find_side_files
from megatron_cpt.convert.source import SourceCheckpoint
from megatron_cpt.errors import RefusedError, UserError
from megatron_cpt.files.whole_io import copy_file, read_file

logger = logging.getLogger(__name__)

_BLOCK_ROWS = 8192
_NEAR_ZERO = 0.05  # share of the median norm of all rows
_MAX_SHOWN = 8

Read = Callable[[str, int, int], torch.Tensor]


@dataclass(frozen=True)
class VocabularyReport:
    """Changes to a vocabulary.

    Attributes:
        before, after: number of tokens before and after.
        num_new: number of rows that were initialized: of the added tokens, and of all other ids that had no row.
        from_pieces: number of these rows that are the mean over pieces of the old tokenizer; the others are the mean of
            all rows.
        without_pieces: new tokens that got the mean of all rows, because the old tokenizer knows no piece of them.
        known: tokens of the list that tokenizer and model already had, which were skipped.
        near_zero: number of rows of the old embedding with a norm under 5 % of the median; their ids were hardly
            trained.
        near_zero_ids: the first 8 of these ids.
    """

    before: int
    after: int
    num_new: int
    from_pieces: int
    known: list[str]
    near_zero: int
    near_zero_ids: list[int]
    without_pieces: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        skipped = f"; {len(self.known)} skipped, already known" if self.known else ""
        ids = f" (ids {', '.join(map(str, self.near_zero_ids))}...)" if self.near_zero else ""
        return (
            f"{self.before:,} -> {self.after:,}: {self.num_new} new, "
            f"{self.from_pieces} initialized from their pieces{self._without_pieces()}{skipped}; "
            f"{self.near_zero} old rows are near zero{ids}"
        )

    def _without_pieces(self) -> str:
        names = [repr(token) for token in self.without_pieces[:_MAX_SHOWN]]
        more = "..." if len(self.without_pieces) > _MAX_SHOWN else ""
        return f", {len(self.without_pieces)} without pieces from all rows ({', '.join(names)}{more})" if names else ""


@dataclass(frozen=True)
class ExtendedVocabulary:
    """Model and tokenizer with new tokens.

    Attributes:
        source: the larger model, with the files of the new tokenizer.
        report: the changes.
        new_ids: ids of the new tokens.
        old_tokenizer, new_tokenizer: folders with the files of both tokenizers.
    """

    source: SourceCheckpoint
    report: VocabularyReport
    new_ids: tuple[int, ...]
    old_tokenizer: Path
    new_tokenizer: Path


def extend_vocabulary(
    source: SourceCheckpoint, tokens: Sequence[str], init_rows: str, scratch: Path
) -> ExtendedVocabulary:
    """Add tokens to a model and to its tokenizer.

    Args:
        source: the model; its side files must include a tokenizer.
        init_rows: `pieces` or `mean`, see `ImportOptions`.
        scratch: empty folder for the files of the old and the new tokenizer, which stay there.

    Raises:
        UserError: the source has no tokenizer, or tokenizer and model already have all tokens.
        RefusedError: the tokenizer cannot be loaded, or gives the new tokens ids with gaps or in use.
    """
    tokenizer = _load_tokenizer(source, scratch / "old")
    vocab, vocabulary = source.model.vocab, tokenizer.get_vocab()
    known = [token for token in tokens if vocabulary.get(token, vocab) < vocab]
    new = [token for token in dict.fromkeys(tokens) if token not in vocabulary]
    if len(known) == len(tokens) and max(vocabulary.values()) < vocab:
        raise UserError("--add-tokens: tokenizer and model already have all of them; omit the option")
    pieces = [_known_pieces(tokenizer, token, vocab) if init_rows == "pieces" else [] for token in new]
    without_pieces = [token for token, own in zip(new, pieces, strict=True) if init_rows == "pieces" and not own]
    tokenizer.add_tokens(list(new))
    ids = [tokenizer.convert_tokens_to_ids(token) for token in new]
    if new and ids != list(range(ids[0], ids[0] + len(new))):
        raise RefusedError(
            f"--add-tokens: the tokenizer gives them the ids {ids[:_MAX_SHOWN]}..., which are not consecutive; add "
            "them to the tokenizer in another way"
        )
    by_number = {number: token for token, number in vocabulary.items()}
    if taken := [f"{number} ({by_number[number]!r})" for number in ids if number in by_number]:
        raise RefusedError(
            "--add-tokens: the vocabulary has gaps, and the tokenizer gives new tokens ids that others have already: "
            f"{', '.join(taken[:_MAX_SHOWN])}; add them to the tokenizer with ids from {max(by_number) + 1} on"
        )
    if new:
        tokenizer.save_pretrained(scratch / "new")

    after = max(vocab, *(number + 1 for number in tokenizer.get_vocab().values()))
    # Every id from `vocab` on gets a row, also of tokens that only the tokenizer had. A model may also have spare rows.
    filled = range(min([vocab, *ids]), after if after > vocab else ids[-1] + 1)
    by_id = dict(zip(ids, pieces, strict=True))
    kept = [number for number in filled if number < vocab and number not in by_id]  # between new ids, in a gap
    by_id |= {number: [number] for number in kept}
    pieces = [by_id.get(number, []) for number in filled]
    model = ModelConfig.model_validate({**source.model.model_dump(mode="json"), "vocab": after})
    rows = {
        name: _new_rows(source.read, name, source.specs[name].shape[1], vocab, pieces)
        for name in (EMBEDDING, OUTPUT_LAYER)
        if name in source.specs
    }
    near_zero = _near_zero_rows(source.read, EMBEDDING, vocab)
    report = VocabularyReport(
        before=vocab,
        after=model.vocab,
        num_new=len(filled) - len(kept),
        from_pieces=sum(map(bool, pieces)) - len(kept),
        known=known,
        near_zero=len(near_zero),
        near_zero_ids=near_zero[:_MAX_SHOWN],
        without_pieces=without_pieces,
    )
    shapes = expected_tensors(model)
    larger = replace(
        source,
        model=model,
        specs={name: TensorSpec(shapes[name], spec.dtype) for name, spec in source.specs.items()},
        read=_read_with_new_rows(source, rows, filled.start),
        # Without a token that is new to it, the tokenizer keeps its files and so its fingerprint in data.
        side_files={**source.side_files, **(find_side_files(scratch / "new") if new else {})},
    )
    return ExtendedVocabulary(larger, report, tuple(ids), scratch / "old", scratch / ("new" if new else "old"))


def _known_pieces(tokenizer: Any, token: str, vocab: int) -> list[int]:
    """Return the ids of a token's pieces; empty if a piece is unknown to the tokenizer or has no row in the model."""
    ids: list[int] = tokenizer(token, add_special_tokens=False).input_ids
    return ids if all(piece < vocab and piece != tokenizer.unk_token_id for piece in ids) else []


def count_ids_without_row(source: SourceCheckpoint) -> int:
    """Return the number of ids of the source's tokenizer.json for which the model has no row; 0 without the file."""
    file = source.side_files.get("tokenizer.json")
    if file is None:
        return 0
    try:
        data = orjson.loads(read_file(file))
        entries = data["model"]["vocab"]
        ids = [*(entries.values() if isinstance(entries, dict) else range(len(entries)))]
        ids += [token["id"] for token in data.get("added_tokens") or []]
        return int(max(0, max(ids, default=-1) + 1 - source.model.vocab))
    except (orjson.JSONDecodeError, KeyError, TypeError, AttributeError):
        logger.warning("%s: not a tokenizer of the tokenizers library; its ids are not compared with the model", file)
        return 0


def _load_tokenizer(source: SourceCheckpoint, folder: Path) -> Any:
    """Load the tokenizer from a copy of its files, since the Hugging Face cache stores them under other names."""
    if not any(name.startswith("tokenizer") for name in source.side_files):
        raise UserError(
            "--add-tokens: the source has no tokenizer files (tokenizer.json, tokenizer_config.json); add "
            "them to its folder"
        )
    folder.mkdir()
    for name, file in source.side_files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        copy_file(file, folder / name)
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # transformers and tokenizers raise many types
        raise RefusedError(f"--add-tokens: the source's tokenizer cannot be loaded: {error}") from error


def _new_rows(read: Read, name: str, width: int, vocab: int, pieces: Sequence[Sequence[int]]) -> torch.Tensor:
    """Return (len(pieces), width) float32 rows: the mean over a token's pieces, or over all rows if it has none."""
    if all(pieces):
        mean = torch.zeros(width)
    else:
        mean = torch.zeros(width, dtype=torch.float64)
        for first in range(0, vocab, _BLOCK_ROWS):
            mean += read(name, first, min(vocab, first + _BLOCK_ROWS)).double().sum(dim=0)
        mean = (mean / vocab).float()
    rows = [
        torch.stack([read(name, piece, piece + 1)[0].float() for piece in token]).mean(dim=0) if token else mean
        for token in pieces
    ]
    return torch.stack(rows)


def _near_zero_rows(read: Read, name: str, vocab: int) -> list[int]:
    norms = torch.cat(
        [
            read(name, first, min(vocab, first + _BLOCK_ROWS)).float().norm(dim=1)
            for first in range(0, vocab, _BLOCK_ROWS)
        ]
    )
    ids: list[int] = (norms < _NEAR_ZERO * norms.median()).nonzero().flatten().tolist()
    return ids


def _read_with_new_rows(source: SourceCheckpoint, rows: dict[str, torch.Tensor], first_id: int) -> Read:
    """Return a `read` that overlays the new rows; their ids may be inside the old embedding, if it was larger."""

    def read(name: str, first: int, last: int) -> torch.Tensor:
        if name not in rows:
            return source.read(name, first, last)
        spec = source.specs[name]
        old_rows = spec.shape[0]
        out = torch.zeros((last - first, *spec.shape[1:]), dtype=spec.dtype)
        if first < old_rows:
            out[: min(last, old_rows) - first] = source.read(name, first, min(last, old_rows))
        begin, end = max(first, first_id), min(last, first_id + len(rows[name]))
        if begin < end:
            out[begin - first : end - first] = rows[name][begin - first_id : end - first_id].to(spec.dtype)
        return out

    return read
