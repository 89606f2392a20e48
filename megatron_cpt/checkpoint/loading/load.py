"""Loading a checkpoint into a run of any layout, while its checksums are compared."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.dict_utils import dict_list_map_inplace, merge, nested_values
from megatron.core.dist_checkpointing.mapping import (
    CheckpointingException,
    ShardedTensorFactory,
    apply_factory_merges,
)
from megatron.core.dist_checkpointing.state_dict_utils import load_preprocess
from megatron.core.dist_checkpointing.utils import extract_sharded_tensors, force_all_tensors_to_non_fp8
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer

from megatron_cpt.backend import set_rng_state
from megatron_cpt.backend.collectives import gathered, on_all
from megatron_cpt.checkpoint.loading.reader import BoxRead, plan_reads, read_boxes
from megatron_cpt.checkpoint.loading.stored_state import StoredState, read_errors_as_refused, read_stored_state
from megatron_cpt.checkpoint.loading.verify_while_reading import ShardVerifier, share_of
from megatron_cpt.checkpoint.manifest import CorruptCheckpointError, Verify, shards_to_compare
from megatron_cpt.checkpoint.record import SavedRun, WeightSet
from megatron_cpt.checkpoint.state import optimizer_shards, state_dicts
from megatron_cpt.errors import CptError, RefusedError
from megatron_cpt.optim.ema import WeightEma

logger = logging.getLogger(__name__)

_MASTER_PREFIXES = ("optimizer.state.param.", "optimizer.state.fp32_param.")


def load_weights(
    saved: SavedRun, chunks: Sequence[DistributedDataParallel], how: Verify = "full", *, weights: WeightSet = "raw"
) -> dict[str, Any]:
    """Load the weights only, or their moving average in place of them; a collective call.

    After an error the content of the model is undefined.

    Returns:
        The weights in the precision of the checkpoint, from which the caller refreshes the master weights. The weights
        of an FP8 model are less exact.

    Raises:
        CorruptCheckpointError: shards are damaged.
        RefusedError: the checkpoint cannot be read, or does not fit the model.
    """
    loaded = _load(state_dicts.model_state(chunks, is_loading=True), saved, how, weights)
    state_dicts.load_model_state(chunks, loaded)
    return loaded


def load_training(
    saved: SavedRun,
    chunks: Sequence[DistributedDataParallel],
    optimizer: MegatronOptimizer,
    how: Verify = "full",
    *,
    ema: WeightEma | None = None,
    with_rng: bool,
) -> None:
    """Load weights, optimizer and, if the layout is the one that saved them, random states; see `load_weights`.

    Args:
        saved: the checkpoint.
        chunks, optimizer: filled in place.
        how: share of the checksums to compare.
        ema: filled in place; None: a moving average in the checkpoint is not read.
        with_rng: also load random states.
    """
    wanted = state_dicts.training_state(chunks, optimizer, ema=ema, is_loading=True, with_rng=with_rng)
    state = _load(wanted, saved, how)
    state_dicts.load_model_state(chunks, state)
    optimizer_shards.load_state(optimizer, state["optimizer"])
    if with_rng:
        set_rng_state(state["rng"])


def _load(wanted: dict[str, Any], saved: SavedRun, how: Verify, weights: WeightSet = "raw") -> dict[str, Any]:
    with _verifying(saved, how) as verifier:
        return on_all(lambda: _fill(wanted, saved.path, verifier, weights))


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
        except CptError as error:  # the same on all ranks; damaged bytes may be the cause
            failure = error
        faults = gathered(on_all(verifier.faults))
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


def _fill(wanted: dict[str, Any], path: Path, verifier: ShardVerifier, weights: WeightSet) -> dict[str, Any]:
    """Read the tensors of a sharded state into their own memory.

    The steps follow `dist_checkpointing.load`: build the parts of tensors that a factory describes (the two
    halves of a gated fc1), read, add the values that are not sharded, and join the parts.

    Returns:
        The state with plain tensors.
    """
    stored = read_stored_state(path)
    _skip_missing_histories(wanted, stored, path)
    aliases = _find_aliases(wanted, stored.shapes) if "optimizer" in wanted else {}
    if weights == "ema":
        aliases = _ema_names(wanted)
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


def _ema_names(wanted: Mapping[str, Any]) -> dict[str, str]:
    """Return the name of each weight's moving average by the weight's name; FP8 histories have none."""
    entries = [entry for entry in nested_values(wanted) if isinstance(entry, ShardedTensor | ShardedTensorFactory)]
    histories = {entry.key for _, _, entry in state_dicts.amax_histories(dict(wanted))}
    return {entry.key: f"{optimizer_shards.EMA_PREFIX}{entry.key}" for entry in entries if entry.key not in histories}


def _find_aliases(wanted: Mapping[str, Any], present: Collection[str]) -> dict[str, str]:
    """Return the names under which a checkpoint holds the fp32 tensors of a run, if they differ from the run's names.

    The fp32 master weight of a parameter X has one of three names, depending on the run that saved it:

    - `optimizer.state.param.X`: the distributed optimizer, in bf16 and in fp32;
    - `optimizer.state.fp32_param.X`: the plain optimizer in bf16;
    - `X`: the plain optimizer in fp32, where the weight itself is the master weight.

    Fp32 weights are read from the checkpoint's master weights, since the weights of a bf16 run are these, rounded.
    Example: an fp32 run with the plain optimizer wants `X`, and the checkpoint of a bf16 run has `X` in bf16 and
    `optimizer.state.param.X` in fp32; the result is `{"X": "optimizer.state.param.X"}`.
    """
    aliases = {}
    for tensor in nested_values(wanted):
        if not isinstance(tensor, ShardedTensor | ShardedTensorFactory) or tensor.data.dtype != torch.float32:
            continue
        weight = tensor.key
        for prefix in _MASTER_PREFIXES:
            weight = weight.removeprefix(prefix)
        found = [name for name in (*(prefix + weight for prefix in _MASTER_PREFIXES), weight) if name in present]
        if found and found[0] != tensor.key:
            aliases[tensor.key] = found[0]
    return aliases
