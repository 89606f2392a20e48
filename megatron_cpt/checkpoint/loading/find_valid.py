"""Finding the newest valid checkpoint of a run, the same one on all ranks."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

import torch.distributed as dist

from megatron_cpt.backend.collectives import gathered, on_all, on_main
from megatron_cpt.checkpoint import layout
from megatron_cpt.checkpoint.manifest import CorruptCheckpointError, FileDigest, Verify, find_faults, read_manifest
from megatron_cpt.checkpoint.record import SavedRun, corrupt_as_refused, read_saved_run
from megatron_cpt.errors import RefusedError
from megatron_cpt.files.retry import retry_disk

logger = logging.getLogger(__name__)

NO_FAULTS: Mapping[Path, Sequence[str]] = MappingProxyType({})


def newest_valid(
    folder: Path, how: Verify = "full", known_faults: Mapping[Path, Sequence[str]] = NO_FAULTS
) -> SavedRun | None:
    """Return the newest checkpoint of a run that is valid, or None if the run has none at all; a collective call.

    Every file must exist with its size, and the small files must have their checksums. The checksums of shards are
    compared later, while the shards are loaded. A corrupt checkpoint is skipped with a warning, and so is a copy under
    the name of another step.

    Args:
        folder: the folder of the run's checkpoints.
        how: `checkpoint.verify`.
        known_faults: of checkpoints that a load has found to be corrupt.

    Raises:
        RefusedError: the run has checkpoints, and none is valid, or the newest is of a newer format.
    """
    # Rank 0 lists the folder: all ranks must verify the same checkpoints, even if a file system shows them late.
    found = on_main(lambda: retry_disk(folder, lambda: _list(folder)))
    reasons = []
    for path in reversed(found):
        saved = _verify_before_load(path, how, known_faults)
        if isinstance(saved, SavedRun):
            with corrupt_as_refused(path):
                step = saved.state["train"]["step"]
            if step == layout.checkpoint_step(path):
                return saved
            problem, faults = "under another name", [f"it holds step {step}; remove it, or name it after its step"]
        else:
            problem, faults = "corrupt", list(saved)
        reasons.append(f"{path.name}: {faults[0]}" + (f" (and {len(faults) - 1} more)" if len(faults) > 1 else ""))
        if dist.get_rank() == 0:
            logger.warning("checkpoint %s is %s and is skipped: %s", path, problem, "; ".join(faults))
    if found:
        raise RefusedError(
            f"{folder}: no valid checkpoint: {'; '.join(reasons)}; restore a valid one or choose another output"
        )
    return None


def _list(folder: Path) -> list[Path]:
    """Return the checkpoints in a folder, and warn of what only looks like one."""
    found = layout.list_checkpoints(folder)
    if ignored := layout.list_ignored(folder):
        logger.warning("%s: ignored, since they are neither a checkpoint nor `latest`: %s", folder, ", ".join(ignored))
    return found


def find_valid(
    named: str | Path, how: Verify = "full", known_faults: Mapping[Path, Sequence[str]] = NO_FAULTS
) -> SavedRun:
    """Return the checkpoint that a user names: its folder, or a run directory, which means the newest valid one in it.

    A collective call; see `newest_valid`.

    Raises:
        UserError: there is nothing of that name.
        RefusedError: the checkpoint is corrupt, or the run has no valid one.
    """
    path = on_main(lambda: layout.resolve_checkpoint(named))
    if path != Path(named) and (saved := newest_valid(path.parent, how, known_faults)):
        return saved
    found = _verify_before_load(path, how, known_faults)
    if isinstance(found, SavedRun):
        return found
    raise CorruptCheckpointError(path, found)


def _verify_before_load(
    path: Path, how: Verify, known_faults: Mapping[Path, Sequence[str]]
) -> SavedRun | Sequence[str]:
    """Return a checkpoint, or its faults except those in the content of shards; the same answer on all ranks.

    Raises:
        CptError: the disk failed on a rank. An older checkpoint is no answer to that.
    """
    if path in known_faults:
        return known_faults[path]

    def examine() -> tuple[Mapping[str, FileDigest] | None, list[str]]:
        try:
            manifest = read_manifest(path)
            return manifest, find_faults(path, how, with_shards=False, manifest=manifest)
        except layout.NewerFormatError:  # it is valid, so an older checkpoint is no answer
            raise
        except RefusedError as error:
            return None, [str(error)]

    manifest, own = on_all(examine)
    return gathered(own) or on_all(lambda: read_saved_run(path, manifest))
