"""What a rank tells the launcher: a file each, in a folder of this launch."""

from __future__ import annotations

import json
import signal
from dataclasses import asdict, dataclass
from pathlib import Path

from megatron_cpt.errors import EXIT_REFUSED, EXIT_STOPPED, EXIT_USER
from megatron_cpt.files.atomic import write_atomically

FOLDER_VARIABLE = "MEGATRON_CPT_LAUNCH_FOLDER"
STOPPING = "stopping"
STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)  # those of megatron_cpt.backend.signals
TOLD = (EXIT_USER, EXIT_REFUSED, EXIT_STOPPED)
"""Statuses that a rank tells the launcher instead of torchrun."""


@dataclass(frozen=True)
class Report:
    """What a rank says of itself.

    Attributes:
        pid: of its process.
        status: its exit status; None while it runs.
        is_early: whether it was stopped before the command handled signals: nothing to save, and the others may wait
            for it.
    """

    pid: int
    status: int | None = None
    is_early: bool = False

    @staticmethod
    def path(folder: Path, local_rank: str) -> Path:
        """Its file; a rank that is started again takes its predecessor's."""
        return folder / f"rank-{local_rank}.json"

    def write(self, path: Path) -> None:
        """Replace the file; the launcher may read it at any moment."""
        write_atomically(path, json.dumps(asdict(self)))


def read_reports(folder: Path) -> list[Report]:
    """Reports of the ranks of this node, as they are now."""
    return [Report(**json.loads(path.read_text())) for path in sorted(folder.glob("rank-*.json"))]
