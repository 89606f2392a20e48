"""Loading a checkpoint into a run of any layout, while its checksums are compared."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.dict_utils import dict_list_map_inplace, merge, nested_values
from megatron.core.dist_checkpointing.mapping import CheckpointingException, apply_factory_merges
from megatron.core.dist_checkpointing.state_dict_utils import load_preprocess
from megatron.core.dist_checkpointing.utils import extract_sharded_tensors, force_all_tensors_to_non_fp8
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer

from megatron_cpt.backend import set_rng_state
from megatron_cpt.backend.collectives import gathered, on_all
from megatron_cpt.checkpoint.loading.reader import BoxRead, plan_reads, read_boxes
from megatron_cpt.checkpoint.loading.stored_state import StoredState, read_errors_as_refused, read_stored_state
from megatron_cpt.checkpoint.loading.tensor_aliases import find_aliases
from megatron_cpt.checkpoint.loading.verify_while_reading import ShardVerifier, share_of
from megatron_cpt.checkpoint.manifest import (
    CorruptCheckpointError,
    Verify,
    shards_to_compare,
)
from megatron_cpt.checkpoint.record import SavedRun
from megatron_cpt.checkpoint.state import optimizer_shards, state_dicts
from megatron_cpt.errors import RefusedError

logger = logging.getLogger(__name__)


def load_weights(saved: SavedRun, chunks: Sequence[DistributedDataParallel], how: Verify = "full") -> dict[str, Any]:
    """Load the weights only; a collective call.

    Args:
        saved: the checkpoint.
        chunks: the model; after an error its content is undefined.
        how: which shards' checksums to compare.

    Returns:
        The weights in the precision of the checkpoint, from which the caller refreshes the master weights. The weights
        of an FP8 model are less exact.

    Raises:
        CorruptCheckpointError: shards are damaged.
        RefusedError: the checkpoint cannot be read, or does not fit the model.
    """
    loaded = _load(state_dicts.model_state(chunks, is_loading=True), saved, how)
    state_dicts.load_model_state(chunks, loaded)
    return loaded


def load_training(
    saved: SavedRun,
    chunks: Sequence[DistributedDataParallel],
    optimizer: MegatronOptimizer,
    how: Verify = "full",
    *,
    with_rng: bool,
) -> None:
    """Load weights, optimizer and, if the layout is the one that saved them, random states; see `load_weights`."""
    wanted = state_dicts.training_state(chunks, optimizer, is_loading=True, with_rng=with_rng)
    state = _load(wanted, saved, how)
    state_dicts.load_model_state(chunks, state)
    optimizer_shards.load_state(optimizer, state["optimizer"])
    if with_rng:
        set_rng_state(state["rng"])


def _load(wanted: dict[str, Any], saved: SavedRun, how: Verify) -> dict[str, Any]:
    def fill(verifier: ShardVerifier) -> dict[str, Any]:
        stored = read_stored_state(saved.path)
        _skip_missing_histories(wanted, stored, saved.path)
        return _fill(wanted, stored, saved.path, verifier)

    with _verifying(saved, how) as verifier:
        return on_all(lambda: fill(verifier))


@contextlib.contextmanager
def _verifying(saved: SavedRun, how: Verify) -> Iterator[ShardVerifier]:
    """Compare the checksums of all shards during a load, divided among the ranks; a collective call.

    Raises:
        CorruptCheckpointError: on all ranks, if some differ. Everything that the load has filled must be discarded.
    """
    expected = shards_to_compare(saved.path, how, saved.manifest)
    failure = None
    with ShardVerifier(saved.path, share_of(expected, dist.get_rank(), dist.get_world_size())) as verifier:
        try:
            yield verifier
        except RefusedError as error:  # the same on all ranks; damaged bytes may be the cause
            failure = error
        faults = gathered(verifier.faults())
    if faults:
        raise CorruptCheckpointError(saved.path, faults) from failure
    if failure is not None:
        raise failure


def _skip_missing_histories(wanted: dict[str, Any], stored: StoredState, path: Path) -> None:
    """Remove amax histories that the checkpoint lacks: a run that switches to FP8 starts new ones."""
    histories = state_dicts.amax_histories(wanted)
    new = [entry for entry in histories if stored.shapes.get(entry[2].key) != tuple(entry[2].global_shape)]
    for model, name, _ in new:
        del model[name]
    if new and dist.get_rank() == 0:
        logger.info("%s has no amax history of this recipe: FP8 scaling starts from scratch", path)


def _fill(wanted: dict[str, Any], stored: StoredState, path: Path, verifier: ShardVerifier) -> dict[str, Any]:
    """Read the tensors of a sharded state into their own memory.

    The steps follow `dist_checkpointing.load`: build the parts of tensors that a factory describes (the two
    halves of a gated fc1), read, add the values that are not sharded, and join the parts.

    Returns:
        The state with plain tensors.
    """
    aliases = find_aliases(wanted, stored.shapes) if "optimizer" in wanted else {}
    force_all_tensors_to_non_fp8(wanted)
    try:
        state, unsaved, factories = load_preprocess(wanted)
        tensors, _ = extract_sharded_tensors(state)
        reads = [
            read for tensor in nested_values(tensors) for read in _plan(tensor, stored, aliases.get(tensor.key), path)
        ]
        with read_errors_as_refused(path):
            read_boxes(reads, verifier.wait_for)
        dict_list_map_inplace(lambda tensor: tensor.data, tensors)
        loaded = stored.common
        merge(loaded, unsaved)
        merge(loaded, tensors)
        filled: dict[str, Any] = apply_factory_merges(loaded, factories)
    except (CheckpointingException, KeyError, TypeError, ValueError) as error:
        raise RefusedError(f"{path}: does not fit this model: {type(error).__name__}: {error}") from error
    return filled


def _plan(tensor: ShardedTensor, stored: StoredState, alias: str | None, path: Path) -> list[BoxRead]:
    name = alias or tensor.key
    shape = tuple(tensor.global_shape)
    is_padded = tensor.allow_shape_mismatch  # vocabularies padded for another TP size differ in their last rows
    if name not in stored.shapes:
        raise RefusedError(f"{path}: does not fit this model: it has no tensor {name}")
    if stored.shapes[name] != shape and not is_padded:
        raise RefusedError(
            f"{path}: does not fit this model: {name} has shape {stored.shapes[name]}, should be {shape}"
        )
    target = tensor.data.detach()[(None,) * tensor.prepend_axis_num]
    if is_padded:
        target.zero_()
    reads = plan_reads(target, tensor.global_offset, stored.boxes[name])
    num_read = sum(read.target.numel() for read in reads)
    if num_read < target.numel() and not is_padded:
        raise RefusedError(
            f"{path}: {name}: only {num_read} of {target.numel()} elements at {tensor.global_offset} are in the "
            "checkpoint; copy the checkpoint again"
        )
    return reads
