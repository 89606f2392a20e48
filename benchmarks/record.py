"""Write benchmark results to benchmarks/results/, together with the machine they were measured on."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import platform
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"


def machine() -> dict[str, Any]:
    """The processor and the versions that a figure depends on."""
    cpu_lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    return {
        "cpu": next(line.partition(": ")[2] for line in cpu_lines if line.startswith("model name")),
        "cores": os.cpu_count(),
        "load_average": os.getloadavg()[0],
        "python": platform.python_version(),
        "packages": {name: importlib.metadata.version(name) for name in ("numpy", "torch", "megatron-core")},
    }


def write_result(name: str, result: dict[str, Any]) -> None:
    """Write results/NAME.json with today's date."""
    path = RESULTS / f"{name}.json"
    path.write_text(
        json.dumps({"date": datetime.date.today().isoformat(), **result}, indent=2) + "\n", encoding="utf-8"
    )
    print(f"wrote {path}")
