"""Process of one item: imports early, waits for its turn, and writes each figure as soon as it has it."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass
class Report:
    """Figures of one item, on disk after each change, so that a killed item leaves what it has measured.

    Attributes:
        path: file of the figures; None keeps them in memory.
        work: folder for everything else; deleted after the measurement.
        memory: folder in main memory, for checkpoints; also deleted.
        is_rehearsal: True at toy width, on any machine.
        arguments: arguments of the item.
    """

    path: Path | None
    work: Path
    memory: Path
    is_rehearsal: bool
    arguments: argparse.Namespace = field(default_factory=argparse.Namespace)
    figures: dict[str, Any] = field(default_factory=dict)

    def note(self, **figures: Any) -> None:
        """Record single values."""
        self.figures |= figures
        if self.path is not None:
            partial = self.path.with_suffix(".partial")
            partial.write_text(json.dumps(self.figures), encoding="utf-8")
            os.replace(partial, self.path)

    def repeated(self, name: str, values: Sequence[float]) -> None:
        """Record a figure that was measured several times."""
        self.note(**{name: spread(values)})


def spread(values: Sequence[float]) -> dict[str, float]:
    """Return median, smallest and largest value, and how many there are."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values), "repetitions": len(values)}


def run_item(
    measure: Callable[[Report], None],
    *,
    imports: Sequence[str] = (),
    options: Sequence[tuple[str, Sequence[str]]] = (),
) -> int:
    """Run one item as a command.

    Args:
        measure: measures and reports.
        imports: modules that `measure` needs; they are imported while another item is measured.
        options: names and choices of further arguments; the first choice is the default.
    """
    parser = argparse.ArgumentParser(description=sys.modules["__main__"].__doc__)
    parser.add_argument("--figures", type=Path, help="file for the figures; printed if it is missing")
    parser.add_argument("--work", type=Path, default=Path("/tmp/gpu-measure"), help="folder for everything else")
    parser.add_argument("--memory", type=Path, default=Path("/tmp/gpu-measure/memory"), help="folder in main memory")
    parser.add_argument("--bundle", type=Path, help="folder that `make gpu-bundle` wrote")
    parser.add_argument("--site", type=Path, help="folder into which the bundle is unpacked")
    parser.add_argument("--turn", type=int, help="pipe that says when the item may start")
    parser.add_argument("--rehearse", action="store_true", help="toy width, on any machine")
    for name, choices in options:
        parser.add_argument(name, choices=choices, default=choices[0])
    arguments = parser.parse_args()
    for module in imports:
        importlib.import_module(module)
    if arguments.turn is not None and not os.read(arguments.turn, 1):
        return 0  # the runner closed the pipe: this item has no turn
    arguments.work.mkdir(parents=True, exist_ok=True)
    report = Report(arguments.figures, arguments.work, arguments.memory, arguments.rehearse, arguments)
    measure(report)
    if report.path is None:
        print(json.dumps(report.figures, indent=2))
    return 0
