"""Reading a checkpoint: verified first, then into any layout."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import orjson
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer
from torch.distributed.checkpoint.api import CheckpointException

from megatron_cpt.backend import set_rng_state
from megatron_cpt.checkpoint import layout, sharded
from megatron_cpt.checkpoint.manifest import find_faults
from megatron_cpt.checkpoint.unpickle import plain_types_only
from megatron_cpt.config import read_mapping
from megatron_cpt.errors import RefusedError

logger = logging.getLogger(__name__)


def newest_sound(folder: Path) -> Path | None:
    """The newest checkpoint of a run that verifies; a collective call where process groups exist.

    Broken ones are passed over with a loud warning.

    Returns:
        Its folder; None where the run has no checkpoint at all.

    Raises:
        RefusedError: there are checkpoints, and none is sound: never start over in silence.
    """
    found = layout.list_checkpoints(folder)
    reasons = []
    for path in reversed(found):
        faults = verify(path)
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


def find_sound(named: str | Path) -> Path:
    """The checkpoint that a user means: a folder, or a run directory's newest that verifies; a collective call.

    Raises:
        UserError: there is nothing of that name.
        RefusedError: it is broken, or a run without a sound checkpoint.
    """
    path = layout.resolve_checkpoint(named)
    if path != Path(named):
        return newest_sound(path.parent) or path
    faults = verify(path)
    if faults:
        raise RefusedError(f"{path}: broken: {'; '.join(faults)}; use another checkpoint")
    return path


def verify(path: Path) -> list[str]:
    """Every fault of a checkpoint's files; the ranks share the checksums and all get the same answer."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    try:
        own = find_faults(path, part=rank, parts=world_size)
    except RefusedError as error:
        own = [str(error)]
    every: list[Any] = [None] * world_size
    dist.all_gather_object(every, own)
    return sorted({fault for part in every for fault in part})


def read_state(path: Path) -> dict[str, Any]:
    """A checkpoint's state.json.

    Raises:
        RefusedError: it cannot be read, or it is of a newer format.
    """
    try:
        state: dict[str, Any] = orjson.loads((path / layout.STATE_FILE).read_bytes())
        version = int(state["format_version"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RefusedError(f"{path / layout.STATE_FILE}: missing or damaged ({error})") from error
    if version > layout.FORMAT_VERSION:
        raise RefusedError(
            f"{path}: format version {version}, this software reads up to {layout.FORMAT_VERSION}; update it"
        )
    return state


def read_run(path: Path) -> dict[str, Any]:
    """The resolved run.yaml that a checkpoint was made with, as plain values."""
    return read_mapping(path / layout.RUN_FILE)


def load_weights(path: Path, chunks: Sequence[DistributedDataParallel]) -> None:
    """Load the weights only; master weights are the caller's to refresh."""
    state = _load(sharded.model_state(chunks), path)
    sharded.load_model_state(chunks, state)


def load_training(
    path: Path, chunks: Sequence[DistributedDataParallel], optimizer: MegatronOptimizer, *, with_rng: bool
) -> None:
    """Load weights, optimizer and, where the layout is the one that saved it, random states."""
    model = sharded.model_state(chunks)
    wanted = {**model, "optimizer": sharded.optimizer_state(optimizer, model, is_loading=True)}
    if with_rng:
        wanted["rng"] = sharded.random_state()
    state = _load(wanted, path)
    sharded.load_model_state(chunks, state)
    optimizer.load_state_dict(state["optimizer"])
    if with_rng:
        set_rng_state(state["rng"])


def _load(wanted: dict[str, Any], path: Path) -> dict[str, Any]:
    try:
        with plain_types_only(path):
            loaded: dict[str, Any] = dist_checkpointing.load(wanted, str(path))
    except CheckpointException as error:  # torch's own, over several ranks; not an Exception
        causes = "; ".join(
            sorted({f"{type(cause).__name__}: {cause}".splitlines()[0] for cause, _ in error.failures.values()})
        )
        raise RefusedError(f"{path}: cannot be read: {causes}") from error
    except (dist_checkpointing.mapping.CheckpointingException, KeyError, ValueError) as error:
        raise RefusedError(f"{path}: does not fit this model: {error}") from error
    return loaded
