"""Time until the other ranks end after one is killed, and cost of hashing the parameters.

    python benchmarks/resilience.py [--kills 5] [--mib 256]

1. Seconds from kill -9 of one rank until the last other rank ends with status 1, in a small job of four ranks (TP 2 x
   DP 2, gloo, the launcher's store).
2. Speed of the hash of parameters (`resilience.parameter_hash_every`) over bf16 weights, compared with `torch.sum`.
"""

from __future__ import annotations

import argparse
import signal
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from record import machine, write_result

sys.path.insert(0, str(Path(__file__).parents[1]))

from tests.helpers.job import Job
from tests.helpers.runs import small_run


def main() -> None:
    """Run the benchmark and write its result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=5, help="number of jobs that lose a rank")
    parser.add_argument("--mib", type=int, default=256, help="MiB of bf16 weights to hash")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        run = small_run(Path(folder))
        seconds = [seconds_to_end(run, Path(folder) / str(number), number % 4) for number in range(options.kills)]
    print(f"kill -9 of one rank of 4: the others end after {min(seconds):.1f} to {max(seconds):.1f} s")
    hashing = hash_speed(options.mib)
    print(f"hash of parameters: {hashing['hash_gb_per_second']:.2f} GB/s; sum: {hashing['sum_gb_per_second']:.2f} GB/s")
    write_result("resilience", {"machine": machine(), "seconds_from_kill_to_last_end": seconds, "hash": hashing})


def seconds_to_end(run: Path, output: Path, rank: int) -> float:
    """Kill a rank of a running job and return the seconds until all others have ended with status 1."""
    arguments = [str(run), f"output={output}", "tokens=1e8", "parallel.tensor=2"]
    metrics = output / "metrics.jsonl"
    with Job(4, arguments, output.with_suffix(".logs")) as job:
        while not (metrics.exists() and metrics.read_bytes().count(b"\n") >= 3):
            assert job.is_running(), job.output()
            time.sleep(0.02)
        job.send(signal.SIGKILL, rank)
        started = time.monotonic()
        while None in job.statuses():
            assert time.monotonic() - started < 120, job.output()
            time.sleep(0.01)
        seconds = time.monotonic() - started
        assert sorted(status or 0 for status in job.statuses()) == [-9, 1, 1, 1], job.output()
    return seconds


def hash_speed(mib: int) -> dict[str, Any]:
    """Return GB per second of the hash and of a sum over the same weights, on one thread; medians of five."""
    import torch

    from megatron_cpt.train.resilience.replicas import bit_hash

    torch.set_num_threads(1)
    weights = torch.randn(mib << 19).bfloat16()
    seconds: dict[str, list[float]] = {"hash": [], "sum": []}
    for _ in range(5):
        for name, function in (("hash", bit_hash), ("sum", torch.sum)):
            started = time.perf_counter()
            function(weights)
            seconds[name].append(time.perf_counter() - started)
    size = weights.nbytes / 1e9
    return {"mib": mib, **{f"{name}_gb_per_second": size / statistics.median(s) for name, s in seconds.items()}}


if __name__ == "__main__":
    main()
