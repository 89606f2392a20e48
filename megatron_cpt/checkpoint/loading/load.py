"""Reading a checkpoint into any layout, verified on the way."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from megatron_cpt.backend import set_rng_state
from megatron_cpt.backend.collectives import gathered, on_all, on_main
from megatron_cpt.checkpoint import layout
from megatron_cpt.checkpoint.loading.reader import in_threads
from megatron_cpt.checkpoint.loading.tensor_aliases import nest_groups, other_names, reading_as
from megatron_cpt.checkpoint.loading.verify_while_reading import ShardCheck
from megatron_cpt.checkpoint.manifest import CorruptCheckpointError, Verify, find_faults
from megatron_cpt.checkpoint.state import state_dicts
from megatron_cpt.checkpoint.torchfile.unpickle import plain_types_only
from megatron_cpt.errors import RefusedError

logger = logging.getLogger(__name__)


def newest_valid(
    folder: Path, how: Verify = "full", broken: Mapping[Path, Sequence[str]] = MappingProxyType({})
) -> Path | None:
    """The newest checkpoint of a run that is sound as far as can be told before its shards are read: a collective call.

    All files are there and of their size, and the small ones have their checksums; those of the shards are compared
    while they are loaded. Broken checkpoints are passed over with a loud warning.

    Args:
        folder: of the run's checkpoints.
        how: `checkpoint.verify`.
        broken: the faults of those that a load found broken.

    Returns:
        Its folder; None where the run has no checkpoint at all.

    Raises:
        RefusedError: there are checkpoints, or have been, and none is sound: never start over in silence.
    """
    # as the main rank sees the folder: every rank must verify the same ones, however late a file system shows them
    found, named = on_main(lambda: _look(folder))
    if not found and named is not None:
        raise RefusedError(
            f"{folder}: latest names {named}, but there is no checkpoint; put one back, choose another output, or "
            f"remove {folder / layout.LATEST_FILE} to start over"
        )
    reasons = []
    for path in reversed(found):
        faults = broken.get(path) or _faults_before_load(path, how)
        if not faults:
            return path
        reasons.append(f"{path.name}: {faults[0]}" + (f" (and {len(faults) - 1} more)" if len(faults) > 1 else ""))
        if dist.get_rank() == 0:
            logger.warning("checkpoint %s is broken and passed over: %s", path, "; ".join(faults))
    if found:
        raise RefusedError(
            f"{folder}: no sound checkpoint: " + "; ".join(reasons) + "; put a sound one back or choose another output"
        )
    return None


def _look(folder: Path) -> tuple[list[Path], str | None]:
    """The checkpoints in a folder, and what `latest` says, if it is there."""
    latest = folder / layout.LATEST_FILE
    return layout.list_checkpoints(folder), latest.read_text(errors="replace").strip() if latest.exists() else None


def find_valid(
    named: str | Path, how: Verify = "full", broken: Mapping[Path, Sequence[str]] = MappingProxyType({})
) -> Path:
    """The checkpoint that a user means: a folder, or a run directory's newest that is sound; see `newest_valid`.

    Raises:
        UserError: there is nothing of that name.
        RefusedError: it is broken, or a run without a sound checkpoint.
    """
    path = on_main(lambda: layout.resolve_checkpoint(named))
    if path != Path(named):
        return newest_valid(path.parent, how, broken) or path
    if faults := broken.get(path) or _faults_before_load(path, how):
        raise CorruptCheckpointError(path, faults)
    return path


def _faults_before_load(path: Path, how: Verify) -> list[str]:
    """Every fault but those of the shards' content; all ranks look, and all get the same answer."""
    try:
        own = find_faults(path, how, with_shards=False)
    except (RefusedError, OSError) as error:  # OSError: a bad block of the disk, and only one rank that meets it
        own = [str(error)]
    return gathered(own)


@contextlib.contextmanager
def _comparing_shards(path: Path, how: Verify) -> Iterator[ShardCheck]:
    """Around the load of a checkpoint: the ranks share its shards and compare their checksums; a collective call.

    Raises:
        CorruptCheckpointError: on all ranks: some differ. Whatever the load has filled is to be thrown away.
    """
    failure = None
    with on_all(lambda: ShardCheck(path, how, part=dist.get_rank(), parts=dist.get_world_size())) as shards:
        try:
            yield shards
        except RefusedError as error:  # what damaged bytes lead to, and what all ranks end with
            failure = error
        faults = gathered(shards.faults())
    if faults:
        raise CorruptCheckpointError(path, faults) from failure
    if failure is not None:
        raise failure


def load_weights(path: Path, chunks: Sequence[DistributedDataParallel], how: Verify = "full") -> dict[str, Any]:
    """Load the weights only; a collective call.

    Args:
        path: the checkpoint.
        chunks: the model; after an error it holds anything.
        how: which shards' checksums to compare.

    Returns:
        The weights as they were read, from which the caller refreshes the master weights; those of the model may be
        less exact, in FP8.

    Raises:
        CorruptCheckpointError: shards are damaged.
        RefusedError: it cannot be read, or does not fit the model.
    """
    wanted = state_dicts.model_state(chunks, is_loading=True)
    loaded = _load(wanted, path, how)
    state_dicts.load_model_state(chunks, loaded)
    return loaded


def load_training(
    path: Path,
    chunks: Sequence[DistributedDataParallel],
    optimizer: MegatronOptimizer,
    how: Verify = "full",
    *,
    with_rng: bool,
) -> None:
    """Load weights, optimizer and, where the layout is the one that saved it, random states; see `load_weights`."""
    wanted = state_dicts.training_state(chunks, optimizer, is_loading=True, with_rng=with_rng)
    state = _load(wanted, path, how)
    state_dicts.load_model_state(chunks, state)
    nest_groups(optimizer, state["optimizer"])
    state_dicts.load_optimizer_state(optimizer, state["optimizer"])
    if with_rng:
        set_rng_state(state["rng"])


def _load(wanted: dict[str, Any], path: Path, how: Verify) -> dict[str, Any]:
    with _comparing_shards(path, how) as shards:
        shapes = on_all(lambda: _read_shapes(path))
        _leave_out_new_histories(wanted, shapes, path)
        names = other_names(wanted, shapes) if "optimizer" in wanted else {}
        return on_all(lambda: _read_all(wanted, names, path, shards))


def _read_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """The whole shape of every tensor of a checkpoint.

    Reads all that megatron-core reads on each rank before the ranks first meet: what fails there fails here.

    Raises:
        RefusedError: a description is damaged, or the disk fails.
    """
    try:
        with plain_types_only(path):
            # megatron-core's own load_tensors_metadata (0.19.2) fails on what newer versions of torch write.
            present = FileSystemReader(path).read_metadata().state_dict_metadata
            dist_checkpointing.load_common_state_dict(str(path))
            return {
                key: tuple(entry.size) for key, entry in present.items() if isinstance(entry, TensorStorageMetadata)
            }
    except RefusedError:
        raise
    except (Exception, CheckpointException) as error:  # damaged bytes lead an unpickler anywhere
        raise RefusedError(f"{path}: cannot be read: {_reason(error)}") from error


def _leave_out_new_histories(wanted: dict[str, Any], shapes: Mapping[str, tuple[int, ...]], path: Path) -> None:
    """Do not ask for amax histories that the checkpoint lacks: a run that takes up FP8 starts new ones."""
    histories = state_dicts.amax_histories(wanted)
    new = [(model, name) for model, name, tensor in histories if shapes.get(tensor.key) != tuple(tensor.global_shape)]
    for model, name in new:
        del model[name]
    if new and dist.get_rank() == 0:
        logger.info("%s has no amax history of this recipe: FP8 scaling starts anew", path)


def _read_all(wanted: dict[str, Any], names: Mapping[str, str], path: Path, shards: ShardCheck) -> dict[str, Any]:
    try:
        with plain_types_only(path), reading_as(names), in_threads(shards.wait_for):
            loaded: dict[str, Any] = dist_checkpointing.load(wanted, str(path))
    except CheckpointException as error:  # torch's own, over several ranks; not an Exception
        raise RefusedError(f"{path}: cannot be read: {_reason(error)}") from error
    except (dist_checkpointing.mapping.CheckpointingException, KeyError, TypeError, ValueError) as error:
        raise RefusedError(f"{path}: does not fit this model: {error}") from error
    return loaded


def _reason(error: BaseException) -> str:
    if isinstance(error, CheckpointException):
        return "; ".join(sorted({_reason(cause) for cause, _ in error.failures.values()}))
    first_line = (str(error).splitlines() or [""])[0]
    return first_line if isinstance(error, RefusedError) else f"{type(error).__name__}: {first_line}"
