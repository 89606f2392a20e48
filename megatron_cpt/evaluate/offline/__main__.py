"""Build the offline evaluation tasks: `python -m megatron_cpt.evaluate.offline [--output DIR]`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from megatron_cpt.errors import CptError
from megatron_cpt.evaluate.offline import VARIABLE, task_folder
from megatron_cpt.evaluate.offline.build_tasks import build


def main() -> int:
    """Build the tasks and print rows by dataset and every reason for which rows were dropped."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--output", type=Path, default=task_folder(), help=f"folder of the tasks (default: ${VARIABLE}, or %(default)s)"
    )
    folder = parser.parse_args().output
    try:
        manifest = build(folder)
    except CptError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_status
    print(f"{'dataset':<20}{'questions':>10}{'examples':>10}  dropped")
    for name, dataset in manifest["datasets"].items():
        rows = {split: file["rows"] for split, file in dataset["files"].items()}
        dropped = ", ".join(f"{len(numbers)} {reason}" for reason, numbers in dataset["dropped"].items())
        print(f"{name:<20}{rows['test']:>10,}{rows.get('fewshot', 0):>10}  {dropped}")
    print(f"\n{len(manifest['task_files'])} task files in {folder}; megatron-cpt evaluate CHECKPOINT --tasks offline")
    return 0


if __name__ == "__main__":
    sys.exit(main())
