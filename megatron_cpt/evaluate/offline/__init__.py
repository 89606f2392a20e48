"""Evaluation tasks whose data installs as Python packages, so they work on machines without a hub.

`python -m megatron_cpt.evaluate.offline` builds them, `megatron-cpt evaluate CHECKPOINT --tasks offline` runs them.
"""

from __future__ import annotations

import os
from pathlib import Path

VARIABLE = "MEGATRON_CPT_TASKS"
BUILD_COMMAND = "python -m megatron_cpt.evaluate.offline"


def task_folder() -> Path:
    """Return the folder of the built tasks: $MEGATRON_CPT_TASKS, or one in the user's cache folder."""
    if chosen := os.environ.get(VARIABLE):
        return Path(chosen)
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "megatron-cpt" / "tasks"
