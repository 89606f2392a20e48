"""List where the host waits for the GPU in one training step of Nemotron-4 15B, on a fake CUDA device.

    python benchmarks/fake_gpu_waits.py

TP8 PP4 on 64 GPUs (two replicas), micro-batch 1, 8 micro-batches: ranks 0, 16 and 63 are the first, a middle and the
last stage. Prints a Markdown table for docs/internals/gpu-path.md, with the number of waits per place and rank.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from tests.helpers.fake_cuda import train_on_fake_gpu

RANKS = {0: "first", 16: "middle", 63: "last"}


def main() -> None:
    """Run the steps and print the table."""
    reports = train_on_fake_gpu([{"rank": rank, "world_size": 64} for rank in RANKS])
    rows: dict[tuple[str, str], list[int]] = defaultdict(lambda: [0] * len(RANKS))
    for column, report in enumerate(reports):
        for wait in report["waits"]:
            caller = f", called from {wait['caller']}" if wait["caller"] != wait["place"] else ""
            rows[wait["kind"], wait["place"] + caller][column] += 1
    print(f"| host waits | where | {' | '.join(RANKS.values())} |\n| --- | --- |{' ---: |' * len(RANKS)}")
    for (kind, place), counts in sorted(rows.items(), key=lambda row: -max(row[1])):
        print(f"| {kind} | {place} | {' | '.join(map(str, counts))} |")
    totals = " | ".join(f"**{len(report['waits'])}**" for report in reports)
    print(f"| **all** | | {totals} |")


if __name__ == "__main__":
    main()
