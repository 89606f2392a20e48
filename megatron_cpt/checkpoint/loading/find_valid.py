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
from megatron_cpt.checkpoint.record import SavedRun, read_saved_run
from megatron_cpt.errors import RefusedError
from megatron_cpt.files.retry import retry_disk
from megatron_cpt.files.whole_io import exists, read_text

logger = logging.getLogger(__name__)

NO_FAULTS: Mapping[Path, Sequence[str]] = MappingProxyType({})


def newest_valid(
    folder: Path, how: Verify = "full", known_faults: Mapping[Path, Sequence[str]] = NO_FAULTS
) -> SavedRun | None:
    """Return the newest checkpoint of a run that is valid, or None if the run has none at all; a collective call.

    Every file must exist with its size, and the small files must have their checksums. The checksums of shards are
    compared later, while the shards are loaded. A corrupt checkpoint is skipped with a warning.

    Args:
        folder: the folder of the run's checkpoints.
        how: `checkpoint.verify`.
        known_faults: of checkpoints that a load has found to be corrupt.

    Raises:
        RefusedError: the run has or had checkpoints, and none is valid: a run never restarts from scratch by itself.
    """
    # Rank 0 lists the folder: all ranks must verify the same checkpoints, even if a file system shows them late.
    found, latest = on_main(lambda: retry_disk(folder, lambda: _list(folder)))
    if not found and latest is not None:
        raise RefusedError(
            f"{folder}: latest names {latest}, but there is no checkpoint; restore one, choose another output, or "
            f"remove {folder / layout.LATEST_FILE} to start from scratch"
        )
    reasons = []
    for path in reversed(found):
        saved = _verify_before_load(path, how, known_faults)
        if isinstance(saved, SavedRun):
            return saved
        reasons.append(f"{path.name}: {saved[0]}" + (f" (and {len(saved) - 1} more)" if len(saved) > 1 else ""))
        if dist.get_rank() == 0:
            logger.warning("checkpoint %s is corrupt and is skipped: %s", path, "; ".join(saved))
    if found:
        raise RefusedError(
            f"{folder}: no valid checkpoint: {'; '.join(reasons)}; restore a valid one or choose another output"
        )
    return None


def _list(folder: Path) -> tuple[list[Path], str | None]:
    """Return the checkpoints in a folder, and the content of `latest` if it exists."""
    latest = folder / layout.LATEST_FILE
    return layout.list_checkpoints(folder), read_text(latest, errors="replace").strip() if exists(latest) else None


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
        except RefusedError as error:
            return None, [str(error)]

    manifest, own = on_all(examine)
    return gathered(own) or on_all(lambda: read_saved_run(path, manifest))
