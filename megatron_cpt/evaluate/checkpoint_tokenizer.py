"""The tokenizer that belongs to a checkpoint."""

from __future__ import annotations

from pathlib import Path

from megatron_cpt.checkpoint.record import SavedRun
from megatron_cpt.convert.side_files import side_files_of_checkpoint, tokenizer_among
from megatron_cpt.data.tokenizers.tokenizer import Tokenizer, load_tokenizer
from megatron_cpt.errors import UserError


def load_checkpoint_tokenizer(saved: SavedRun, spec: str | None = None) -> Tokenizer:
    """Load the tokenizer of a checkpoint: the one of its run, or the files that were imported with its weights.

    Args:
        spec: KIND:PATH of another place, or None.

    Raises:
        UserError: there is none on this machine, or it is not the one that the checkpoint was trained with.
    """
    spec = spec or find_tokenizer(saved)
    tokenizer = load_tokenizer(spec)
    expected = saved.state.get("tokenizer_fingerprint")
    if expected is not None and expected != tokenizer.fingerprint:
        raise UserError(
            f"tokenizer {spec}: not the one that {saved.path} was trained with, so its ids mean other text; give that "
            "one with --tokenizer KIND:PATH"
        )
    return tokenizer


def find_tokenizer(saved: SavedRun) -> str:
    """Return KIND:PATH of a checkpoint's tokenizer.

    Raises:
        UserError: there is none on this machine.
    """
    spec = saved.run.get("tokenizer")
    if isinstance(spec, str) and (":" not in spec or Path(spec.partition(":")[2]).exists()):
        return spec
    if found := tokenizer_among(side_files_of_checkpoint(saved.path)):
        return found
    missing = f"its tokenizer {spec} is not on this machine" if spec else "it names no tokenizer"
    raise UserError(f"{saved.path}: {missing}; give one with --tokenizer KIND:PATH")
