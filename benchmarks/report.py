"""Time and size of a report of one million metric lines.

    python benchmarks/report.py [--lines 1000000]

Writes a synthetic metrics.jsonl (750 bytes per line, six sources, a spike) and runs `megatron-cpt report` on it in new
processes. Every page must have the same bytes.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import orjson
import yaml
from record import machine, write_result

SOURCES = ("web", "articles", "excerpts", "code", "manual", "languages")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lines", type=int, default=1_000_000)
    parser.add_argument("--repeat", type=int, default=3)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="report.") as name:
        folder = Path(name) / "run"
        write_run(folder, options.lines)
        size = (folder / "metrics.jsonl").stat().st_size
        runs = [report(folder, Path(name) / f"{number}.html") for number in range(options.repeat)]
        pages = {(Path(name) / f"{number}.html").read_bytes() for number in range(options.repeat)}
    if len(pages) != 1:
        raise SystemExit("the same files gave different pages")
    result: dict[str, Any] = {
        "what": "megatron-cpt report RUN, a fresh process",
        "machine": machine(),
        "lines": options.lines,
        "metrics_bytes": size,
        "report_bytes": len(pages.pop()),
        "seconds": sorted(run["seconds"] for run in runs)[len(runs) // 2],
        "cpu_seconds": sorted(run["cpu_seconds"] for run in runs)[len(runs) // 2],
        "each_run": runs,
        "peak_memory_mib": resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss // 1024,
    }
    seconds = f"{result['seconds']:.1f} s ({result['cpu_seconds']:.1f} s of CPU)"
    print(f"{options.lines:,} lines, {size / 1e6:.0f} MB: {seconds}")
    print(f"report.html: {result['report_bytes'] / 1e3:.0f} KB; peak memory {result['peak_memory_mib']} MiB")
    write_result("report", result)


def write_run(folder: Path, lines: int) -> None:
    """Write run.yaml and metrics.jsonl of a run with a line per step."""
    folder.mkdir()
    (folder / "run.yaml").write_text(yaml.safe_dump({"name": "million", "output": str(folder)}))
    times = {"tokens_per_second": 8767.4231, "step_seconds": 0.46721934, "data_wait_seconds": 0.0006203020002431}
    with open(folder / "metrics.jsonl", "wb") as file:
        for step in range(1, lines + 1):
            loss = 3 + 2 / (1 + step / lines * 5) + 0.05 * (step * 2654435761 % 1000 / 1000)
            line = {
                "step": step,
                "tokens": step * 4096,
                "phase": "general" if step < 0.7 * lines else "qa",
                "lr": 4e-4 * (1 - step / lines),
                "loss": 30.0 if step == lines // 3 else loss,
                "grad_norm": 0.4416161772221597,
                **times,
                "sync_wait_seconds": 0.002033958500396693,
                "pause_seconds": 0.0,
                "tflops_per_gpu": 0.03728043850866661,
                "mfu": None,
                "peak_memory_gib": 0.621551513671875,
                "reserved_memory_gib": None,
                "eta": 79.9896567743097,
                "loss_by_source": {name: loss + place / 10 for place, name in enumerate(SOURCES)},
                "samples_by_source": {name: step * (place + 1) for place, name in enumerate(SOURCES)},
                "skipped_updates": 0,
            }
            file.write(orjson.dumps(line) + b"\n")
            if step % 5000 == 0:
                validation = {name: loss + place / 5 for place, name in enumerate(SOURCES)}
                file.write(orjson.dumps({"step": step, "validation": validation}) + b"\n")


def report(folder: Path, output: Path) -> dict[str, float]:
    """Run the command in a fresh process; return its wall and CPU seconds."""
    command = [sys.executable, "-m", "megatron_cpt", "report", str(folder), "--output", str(output)]
    started, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"seconds": round(time.perf_counter() - started, 2), "cpu_seconds": round(cpu, 2)}


if __name__ == "__main__":
    main()
