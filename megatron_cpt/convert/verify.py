"""Comparison of a checkpoint with a Hugging Face folder: every tensor is accounted for, every byte compared."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_cpt.checkpoint.record import WeightSet
from megatron_cpt.config import ModelConfig
from megatron_cpt.convert.exporter import TensorBlock, blocks, open_checkpoint, read_block
from megatron_cpt.convert.huggingface.config import read_model
from megatron_cpt.convert.huggingface.folder import CONFIG_FILE, HfFolder
from megatron_cpt.convert.job import Advance, no_progress, run_parallel
from megatron_cpt.convert.mapping.names import EMBEDDING, OUTPUT_LAYER
from megatron_cpt.convert.mapping.resolve import check_hf_tensors, resolve
from megatron_cpt.convert.source import SourceCheckpoint, identify_folder
from megatron_cpt.errors import RefusedError
from megatron_cpt.files.identity import must_not_change
from megatron_cpt.files.system_errors import os_errors_as_cpt_errors

# Fields that do not change what a model computes, or change only its padding
_IGNORED_FIELDS = {
    "preset",
    "max_positions",
    "init_std",
    "attention_dropout",
    "hidden_dropout",
    "vocab_multiple",
    "padding_in_softmax",
}

_EMA_NOTE = "the checkpoint also has a moving average of its weights, which --weights ema compares"


@dataclass(frozen=True)
class TensorReport:
    """Result of a comparison.

    Attributes:
        num_tensors: number of Hugging Face tensors that were compared.
        num_bytes: size of these tensors in the checkpoint.
        num_cast: number of tensors with another dtype in the checkpoint; compared in the narrower of both dtypes.
        differing: tensor -> number of elements that differ in at least one bit.
        padding: tensor -> number of rows of padding in the checkpoint that are not zero; they do no harm.
        note: what else the folder may be compared with; empty: nothing, or there is no difference.
    """

    family: str
    num_tensors: int
    num_bytes: int
    num_cast: int
    differing: Mapping[str, int]
    padding: Mapping[str, int]
    note: str = ""

    @property
    def is_equal(self) -> bool:
        """True if no element differs."""
        return not self.differing

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain values."""
        return {"equal": self.is_equal, **asdict(self)}


def verify_tensors(
    hf: str | Path,
    checkpoint: str | Path,
    *,
    workers: int = 0,
    allow_pickle: bool = False,
    model: str | None = None,
    weights: WeightSet = "raw",
    advance: Advance = no_progress,
) -> TensorReport:
    """Compare a checkpoint, as it would be exported, with a Hugging Face folder, a part of a tensor at a time.

    Args:
        checkpoint: a checkpoint, a run directory (its newest checkpoint), or a Megatron checkpoint.
        workers: number of threads; 0: one per core.
        allow_pickle: also read pickled `.bin` weights.
        model: a preset, or a YAML file with a model section, for Megatron checkpoints without a usable config.
        weights: `ema`: compare the moving average of the checkpoint's weights.
        advance: progress callback, see `Advance`.

    Raises:
        UserError: the folder or the checkpoint does not exist, or the checkpoint has no moving average.
        RefusedError: one of them is corrupt or changes while it is read, or they are different models: tensors are
            missing, unknown or of another shape.
        CptError: the operating system failed, for example with a block that cannot be read.
    """
    hf, checkpoint = Path(hf), Path(checkpoint)
    with os_errors_as_cpt_errors():
        before = identify_folder(hf)
        folder = HfFolder(hf, allow_pickle=allow_pickle)
        family, hf_model = read_model(folder.config, hf / CONFIG_FILE)
        rules = resolve(family, hf_model)
        check_hf_tensors(rules, folder.tensors, hf_model, hf)
        opened = open_checkpoint(checkpoint, model=model, weights=weights)
        _refuse_other_model(hf, hf_model, checkpoint, opened.model)
        differing: Counter[str] = Counter()
        lock = threading.Lock()
        total = sum(spec.num_bytes for spec in opened.specs.values())
        advance(0, total)

        def compare(block: TensorBlock) -> None:
            ours = read_block(opened, block)
            theirs = folder.read(block.name, slice(block.first, block.last))
            narrower = theirs.dtype if theirs.itemsize < ours.itemsize else ours.dtype
            count = num_different(theirs.to(narrower), ours.to(narrower))
            if count:
                with lock:
                    differing[block.name] += count
            advance(ours.nbytes, total)

        files = {(hf / CONFIG_FILE).resolve(), *(info.file for info in folder.tensors.values())}
        with must_not_change([*opened.identities, *(before[file] for file in files & before.keys())]):
            run_parallel(compare, list(blocks(rules)), workers)
        may_be_average = differing and weights == "raw" and opened.has_ema
        dtypes = [(folder.tensors[name].dtype, opened.specs[rule.megatron].dtype) for rule in rules for name in rule.hf]
        return TensorReport(
            family=family.name,
            num_tensors=len(dtypes),
            num_bytes=total,
            num_cast=sum(hf_dtype != our_dtype for hf_dtype, our_dtype in dtypes),
            differing=dict(sorted(differing.items())),
            padding=_count_nonzero_padding(opened),
            note=_EMA_NOTE if may_be_average else "",
        )


def num_different(first: torch.Tensor, second: torch.Tensor) -> int:
    """Return the number of elements that differ in at least one bit. A NaN equals itself, 0.0 differs from -0.0."""
    integer = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[first.dtype.itemsize]
    a, b = first.contiguous().view(integer), second.contiguous().view(integer)
    return 0 if torch.equal(a, b) else int((a != b).sum())


def _refuse_other_model(hf: Path, hf_model: ModelConfig, checkpoint: Path, model: ModelConfig) -> None:
    theirs, ours = (
        {
            **config.model_dump(mode="json", exclude=_IGNORED_FIELDS),
            "kv_groups": config.num_kv_groups,
            "head_dim": config.head_size,
        }
        for config in (hf_model, model)
    )
    problems = [
        f"{key}: {theirs[key]} in the Hugging Face folder, {ours[key]} in the checkpoint"
        for key in theirs
        if theirs[key] != ours[key]
    ]
    if problems:
        lines = [f"{hf} and {checkpoint} are different models:", *(f"  - {problem}" for problem in problems)]
        raise RefusedError("\n".join(lines))


def _count_nonzero_padding(checkpoint: SourceCheckpoint) -> dict[str, int]:
    """Count rows of padding that are not zero; training may change them."""
    vocab, padded = checkpoint.model.vocab, checkpoint.model.padded_vocab
    found = {}
    for name in (EMBEDDING, OUTPUT_LAYER):
        if name in checkpoint.specs and padded > vocab:
            count = int(checkpoint.read(name, vocab, padded).abs().sum(dim=1).count_nonzero())
            if count:
                found[name] = count
    return found
