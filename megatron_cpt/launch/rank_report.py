"""Files by which the ranks of a node and the launcher inform each other, in a temporary folder of this launch."""

from __future__ import annotations

import json
import signal
from dataclasses import asdict, dataclass
from pathlib import Path

from megatron_cpt.files.atomic import write_atomically
from megatron_cpt.files.whole_io import read_text

FOLDER_VARIABLE = "MEGATRON_CPT_LAUNCH_FOLDER"
STOP_FILE = "stopping"
"""Created by the launcher when it receives a stop signal; read by ranks that start after that."""
# megatron_cpt.backend.signals, which imports torch, has the same signals
STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


@dataclass(frozen=True)
class Report:
    """State of one rank.

    Attributes:
        pid: process id.
        status: exit status; None while the rank runs, and after a death by a signal.
        is_early: stopped before the command installed its signal handlers. The rank had nothing to save, and other
            ranks may wait for it.
    """

    pid: int
    status: int | None = None
    is_early: bool = False

    @staticmethod
    def path(folder: Path, local_rank: str) -> Path:
        """File of a rank; after a restart the new process overwrites it."""
        return folder / f"rank-{local_rank}.json"

    def write(self, path: Path) -> None:
        """Replace the file; the launcher may read it at any moment."""
        write_atomically(path, json.dumps(asdict(self)))


def read_reports(folder: Path) -> list[Report]:
    """Return the current reports of this node's ranks."""
    return [Report(**json.loads(read_text(path))) for path in sorted(folder.glob("rank-*.json"))]
