"""Is a checkpoint the same model as a Hugging Face folder? Every tensor accounted for, every byte compared."""

from __future__ import annotations

import os
import threading
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_cpt.config import ModelConfig
from megatron_cpt.convert.exporter import TensorBlock, blocks, open_source, read_block
from megatron_cpt.convert.huggingface.config import read_model
from megatron_cpt.convert.huggingface.folder import CONFIG_FILE, HfFolder
from megatron_cpt.convert.job import Advance, os_errors_as_cpt_errors, run_parallel
from megatron_cpt.convert.mapping.resolve import check_tensors, resolve
from megatron_cpt.convert.source import SourceCheckpoint
from megatron_cpt.errors import RefusedError

_NOTES = {"preset", "max_positions", "init_std", "attention_dropout", "hidden_dropout", "vocab_multiple"}


@dataclass(frozen=True)
class TensorReport:
    """What a comparison found.

    Attributes:
        family: of the folder.
        num_tensors: Hugging Face tensors that were compared.
        num_bytes: of them, as the checkpoint holds them.
        num_cast: tensors of another type in the checkpoint; compared as the narrower of the two.
        differing: tensor -> number of elements that differ in at least one bit.
        padding: rows of padding in the checkpoint that are not zero, by tensor; harmless, and worth a word.
    """

    family: str
    num_tensors: int
    num_bytes: int
    num_cast: int
    differing: Mapping[str, int]
    padding: Mapping[str, int]

    @property
    def is_equal(self) -> bool:
        """Whether every byte is as it should be."""
        return not self.differing

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {"equal": self.is_equal, **asdict(self)}


def verify_tensors(
    hf: Path,
    checkpoint: Path,
    *,
    workers: int = 0,
    allow_pickle: bool = False,
    model: str | None = None,
    advance: Advance,
) -> TensorReport:
    """Compare a checkpoint with a Hugging Face folder as its export would be, a part of a tensor at a time.

    Args:
        hf: the folder.
        checkpoint: of ours, a run's newest, or one of Megatron.
        workers: threads; 0: all cores.
        allow_pickle: read `.bin` weights.
        model: a preset or file that says what a checkpoint of Megatron is.
        advance: told of the bytes compared.

    Raises:
        UserError: one of them is not there.
        RefusedError: one is damaged, or they are different models: tensors missing, surplus or of another shape.
        CptError: the system fails in the middle.
    """
    with os_errors_as_cpt_errors():
        return _verify(hf, checkpoint, workers or os.cpu_count() or 1, allow_pickle, model, advance)


def _verify(
    hf: Path, checkpoint: Path, workers: int, allow_pickle: bool, model: str | None, advance: Advance
) -> TensorReport:
    folder = HfFolder(hf, allow_pickle=allow_pickle)
    family, wanted = read_model(folder.config, hf / CONFIG_FILE)
    rules = resolve(family, wanted)
    check_tensors(rules, folder.tensors, wanted, hf)
    incoming = open_source(checkpoint, model=model)
    _check_model(hf, wanted, checkpoint, incoming.model)
    differing: Counter[str] = Counter()
    lock = threading.Lock()
    total = sum(form.num_bytes for form in incoming.forms.values())
    advance(0, total)

    def work(block: TensorBlock) -> None:
        there = read_block(incoming, block)
        here = folder.read(block.name, slice(block.first, block.last))
        narrow = here.dtype if here.itemsize < there.itemsize else there.dtype
        count = num_different(here.to(narrow), there.to(narrow))
        if count:
            with lock:
                differing[block.name] += count
        advance(there.nbytes, total)

    run_parallel(work, list(blocks(rules)), workers)
    cast = [
        name for rule in rules for name in rule.hf if folder.tensors[name].dtype != incoming.forms[rule.megatron].dtype
    ]
    return TensorReport(
        family.name,
        sum(len(rule.hf) for rule in rules),
        total,
        len(cast),
        dict(sorted(differing.items())),
        _padding_rows(incoming),
    )


def num_different(first: torch.Tensor, second: torch.Tensor) -> int:
    """Elements that are not the same to the bit (NaN equals the same NaN, 0 is not -0)."""
    integer = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[first.dtype.itemsize]
    a, b = first.contiguous().view(integer), second.contiguous().view(integer)
    return 0 if torch.equal(a, b) else int((a != b).sum())


def _check_model(hf: Path, wanted: ModelConfig, checkpoint: Path, found: ModelConfig) -> None:
    here, there = wanted.model_dump(mode="json", exclude=_NOTES), found.model_dump(mode="json", exclude=_NOTES)
    for plain, model in ((here, wanted), (there, found)):
        plain |= {"kv_groups": model.num_kv_groups, "head_dim": model.head_size}
    wrong = [f"{key}: {here[key]} there, {there[key]} in the checkpoint" for key in here if here[key] != there[key]]
    if wrong:
        raise RefusedError("\n".join([f"{hf} and {checkpoint} are different models:", *(f"  - {w}" for w in wrong)]))


def _padding_rows(incoming: SourceCheckpoint) -> dict[str, int]:
    """Padding of embedding and output layer that is not zero: training moves it a little where it is trained at all."""
    vocab, padded = incoming.model.vocab, incoming.model.padded_vocab
    found = {}
    for name in ("embedding.word_embeddings.weight", "output_layer.weight"):
        if name in incoming.forms and padded > vocab:
            rows = int(incoming.read(name, vocab, padded).abs().sum(dim=1).count_nonzero())
            if rows:
                found[name] = rows
    return found
