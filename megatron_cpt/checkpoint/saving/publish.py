"""Publication of a checkpoint: write the manifest, rename the folder, update `latest`, retire older checkpoints."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata

from megatron_cpt.checkpoint import layout
from megatron_cpt.checkpoint.manifest import FileDigest, digest, manifest_text
from megatron_cpt.checkpoint.saving.writer import Written
from megatron_cpt.files.atomic import sync_folder, write_atomically
from megatron_cpt.files.whole_io import DiskFile

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Retention:
    """Rule for which checkpoints are kept.

    Attributes:
        keep: number of newest checkpoints to keep; None: all.
        keep_every: checkpoints whose step is a multiple of it are always kept; None: no such checkpoints.
    """

    keep: int | None = None
    keep_every: int | None = None

    def outdated(self, checkpoints: Sequence[Path], newest: Path) -> list[Path]:
        """Return the checkpoints that may be deleted once `newest` is published.

        A checkpoint of a later step is a corrupt one, from which the run has rolled back; it is neither counted nor
        deleted. Example with keep=1: steps 10 (valid) and 20 (corrupt) exist, and the run saves step 15. If step 20
        counted as the newest, 10 and 15 would be deleted.
        """
        if self.keep is None:
            return []
        step = layout.checkpoint_step(newest)
        counted = [path for path in checkpoints if layout.checkpoint_step(path) <= step]
        every = self.keep_every
        return [path for path in counted[: -self.keep] if every is None or layout.checkpoint_step(path) % every]


def publish(
    aside: Path, final: Path, metadata: Metadata, written: Sequence[Written], retention: Retention
) -> list[Path]:
    """Turn the files that all ranks have written into a checkpoint; called on one rank, not a collective call.

    Args:
        aside: the folder with the files.
        final: the checkpoint's name; an existing checkpoint of that name is replaced.
        metadata: torch's description of the tensors, without their places in the files.
        written: the report of each rank.
        retention: of older checkpoints.

    Returns:
        Folders that are no longer checkpoints and may be deleted later.

    Raises:
        OSError: a file cannot be written, or has another size than its rank reported.
    """
    FileSystemWriter(aside).finish(metadata, [part.places for part in written])
    shards = {name: expected for part in written for name, expected in part.files.items()}
    for name, expected in shards.items():
        if (size := (aside / name).stat().st_size) != expected.size:
            raise OSError(f"{aside / name}: {size} bytes, but {expected.size} were written")
    files = {**shards, **_measure_others(aside, shards)}
    write_atomically(aside / layout.MANIFEST_FILE, manifest_text(files))
    sync_folder(aside)
    delete(path for path in layout.list_leftovers(final.parent) if path != aside)  # left by runs that were killed
    outdated = [final] if final.exists() else []  # the run has rolled back and saves this step again
    if outdated:
        os.rename(final, layout.deleted_name(final))
    os.rename(aside, final)
    sync_folder(final.parent)
    try:
        write_atomically(final.parent / layout.LATEST_FILE, f"{final.name}\n")
        for old in retention.outdated(layout.list_checkpoints(final.parent), final):
            # Renamed first, so that a partly deleted folder never has the name of a checkpoint.
            os.rename(old, layout.deleted_name(old))
            outdated.append(old)
    except OSError as error:  # the checkpoint is published, so the run can continue
        logger.warning("%s is saved, but updating `latest` or retiring older checkpoints failed: %s", final, error)
    return [layout.deleted_name(old) for old in outdated]


def delete(folders: Iterable[Path]) -> None:
    """Delete folders with their content; a failure is only a warning, since the new checkpoint is complete."""
    for folder in folders:
        try:
            shutil.rmtree(folder)
        except OSError as error:
            logger.warning("%s: cannot be deleted: %s; delete it by hand", folder, error)


def _measure_others(aside: Path, shards: Mapping[str, FileDigest]) -> dict[str, FileDigest]:
    """Fsync the small files beside the shards; return their digests."""
    found = {}
    for path in sorted(aside.iterdir()):
        if path.name not in shards:
            with DiskFile(path) as file:
                file.sync()
            found[path.name] = digest(path)
    return found
