"""From a folder of written shards to a checkpoint: manifest, one rename, `latest`, and which older ones go."""

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

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Retention:
    """Which checkpoints stay.

    Attributes:
        keep: how many of the newest; None: all.
        keep_every: those whose step it divides stay for ever; None: none do.
    """

    keep: int | None = None
    keep_every: int | None = None

    def outdated(self, checkpoints: Sequence[Path], newest: Path) -> list[Path]:
        """What may go now that `newest` is there.

        One of a later step does not count and is not touched: a run that went back before it passed over it as
        broken, and with it counted, the sound ones would go.
        """
        if self.keep is None:
            return []
        step = layout.checkpoint_step(newest)
        counted = [path for path in checkpoints if layout.checkpoint_step(path) <= step]
        return [
            path
            for path in counted[: -self.keep]
            if self.keep_every is None or layout.checkpoint_step(path) % self.keep_every
        ]


def publish(
    aside: Path, final: Path, metadata: Metadata, written: Sequence[Written], retention: Retention
) -> list[Path]:
    """Make a checkpoint of what all ranks have written; on one rank, with no other rank's help.

    Args:
        aside: the folder that was written.
        final: its name from here on; what lies there of an earlier try is replaced.
        metadata: torch's description of the tensors, without their places.
        written: what each rank reported.
        retention: which older ones stay.

    Returns:
        Folders that are no checkpoints any more and may be deleted when there is time.

    Raises:
        OSError: it cannot be written, or a file is not as its rank reported it.
    """
    FileSystemWriter(aside).finish(metadata, [part.places for part in written])
    shards = {name: expected for part in written for name, expected in part.files.items()}
    for name, expected in shards.items():
        if (size := (aside / name).stat().st_size) != expected.size:
            raise OSError(f"{aside / name}: {size} bytes, {expected.size} were written")
    files = {**shards, **_measure_others(aside, shards)}
    write_atomically(aside / layout.MANIFEST_FILE, manifest_text(files))
    sync_folder(aside)
    delete(path for path in layout.list_leftovers(final.parent) if path != aside)  # of runs that were killed
    outdated = [final] if final.exists() else []  # the same step once more, after a resume from an older checkpoint
    if outdated:
        os.rename(final, layout.deleted_name(final))
    os.rename(aside, final)
    sync_folder(final.parent)
    try:
        write_atomically(final.parent / layout.LATEST_FILE, f"{final.name}\n")
        for old in retention.outdated(layout.list_checkpoints(final.parent), final):
            # Renamed first: one that is half deleted must not be found under a checkpoint's name.
            os.rename(old, layout.deleted_name(old))
            outdated.append(old)
    except OSError as error:  # no reason to end the run: this one is published
        logger.warning("%s is saved, but what should follow failed: %s", final, error)
    return [layout.deleted_name(old) for old in outdated]


def delete(folders: Iterable[Path]) -> None:
    """Delete folders with all that is in them; one that stays is a warning, for the new checkpoint is as good."""
    for folder in folders:
        try:
            shutil.rmtree(folder)
        except OSError as error:
            logger.warning("%s: cannot be deleted: %s; delete it by hand", folder, error)


def _measure_others(aside: Path, shards: Mapping[str, FileDigest]) -> dict[str, FileDigest]:
    """The small files beside the shards, made durable."""
    found = {}
    for path in sorted(aside.iterdir()):
        if path.name not in shards:
            with open(path, "rb") as file:
                os.fsync(file.fileno())
            found[path.name] = digest(path)
    return found
