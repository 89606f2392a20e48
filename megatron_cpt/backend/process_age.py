"""Age of this process."""

from __future__ import annotations

import os
import time
from pathlib import Path


def seconds_since_process_start() -> float:
    """Return the age of this process, including imports and loading, as a scheduler counts it.

    The clock is the time since boot, which setting the date does not change. Fields of /proc/PID/stat: man proc.
    """
    after_name = Path("/proc/self/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    started = int(after_name[19]) / os.sysconf("SC_CLK_TCK")
    return time.clock_gettime(time.CLOCK_BOOTTIME) - started
