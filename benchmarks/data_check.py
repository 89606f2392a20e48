"""Speed at which `check` scans all ids of a file, compared with numpy's maximum over the file.

    python benchmarks/data_check.py [--gigabytes 2] [--repeat 7]

The file has uint16 ids below a vocabulary of 50,000 and is in the page cache. numpy runs `np.memmap(...).max()`, one
call in one thread, which finds only the largest id. The scan maps each block first, so that a bad sector is an error
instead of SIGBUS, runs one thread per core, and finds the position of every id outside the vocabulary. Both take turns
with numpy's maximum of an array in memory; the results are medians. The complete check of index and documents is timed
as well.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from record import machine, write_result

from megatron_cpt.data.inspect.check import check_dataset
from megatron_cpt.data.inspect.scan_ids import scan_ids
from megatron_cpt.data.tokenfile.header import read_header
from megatron_cpt.data.tokenfile.writer import IndexedDatasetWriter

VOCABULARY, MEAN_DOCUMENT = 50_000, 1000
TOKENS_PER_WRITE = 1 << 24


def main() -> None:
    options = parse_arguments()
    with tempfile.TemporaryDirectory(prefix="data_check.", dir=options.folder) as folder:
        prefix = str(Path(folder) / "ids")
        write_data(prefix, int(options.gigabytes * 1e9))
        rounds = time_all(prefix, options.repeat)
        begin = time.perf_counter()
        report = check_dataset(prefix, vocab_size=VOCABULARY)
        check_seconds = time.perf_counter() - begin
    assert report.is_valid, [str(finding) for finding in report.findings]
    num_bytes = report.scan.num_bytes
    speeds = {name: num_bytes / 1e9 / statistics.median(seconds) for name, seconds in rounds.items()}
    ratios = {
        name: statistics.median(b / a for a, b in zip(rounds["scan"], rounds[name], strict=True))
        for name in ("memmap_max", "memory_max")
    }
    print(f"{'':40}{'GB/s':>8}")
    for name, speed in speeds.items():
        print(f"{name:40}{speed:8.2f}")
    print(f"{'complete check':40}{num_bytes / 1e9 / check_seconds:8.2f}")
    print(f"speed of the scan: {ratios['memmap_max']:.2f} x memmap max, {ratios['memory_max']:.2f} x max in memory")
    write_result(
        "data_check",
        {
            "what": "every id of a .bin compared with the vocabulary; numpy's max of the file",
            "machine": machine(),
            "bytes": num_bytes,
            "documents": report.header.num_documents,
            "gigabytes_per_second": {**speeds, "whole_check": num_bytes / 1e9 / check_seconds},
            "seconds": rounds,
            "scan_speed_over": ratios,
        },
    )


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=2.0, help="size of the file, at most half of the memory")
    parser.add_argument("--repeat", type=int, default=7, help="number of rounds")
    parser.add_argument("--folder", help="folder for the file")
    return parser.parse_args()


def write_data(prefix: str, num_bytes: int) -> None:
    """Write random ids in documents of random lengths that end with id 0."""
    rng = np.random.default_rng(0)
    with IndexedDatasetWriter(prefix, np.uint16) as writer:
        for _ in range(max(1, num_bytes // (2 * TOKENS_PER_WRITE))):
            tokens = rng.integers(1, VOCABULARY, TOKENS_PER_WRITE, dtype=np.uint16)
            ends = np.unique(
                np.append(rng.integers(1, TOKENS_PER_WRITE, TOKENS_PER_WRITE // MEAN_DOCUMENT), TOKENS_PER_WRITE)
            )
            tokens[ends - 1] = 0
            writer.add_documents(tokens, np.diff(ends, prepend=0))


def time_all(prefix: str, repeat: int) -> dict[str, list[float]]:
    """Return the seconds of each round; all tasks must find the same largest id."""
    header = read_header(prefix)
    path, dtype = f"{prefix}.bin", header.dtype
    in_memory = np.fromfile(path, dtype)  # also brings the file into the page cache
    tasks: dict[str, Callable[[], Any]] = {
        "scan": lambda: scan_ids(path, dtype, header.num_tokens, VOCABULARY).max_id,
        "scan_one_thread": lambda: scan_ids(path, dtype, header.num_tokens, VOCABULARY, num_threads=1).max_id,
        "memmap_max": lambda: int(np.memmap(path, dtype, mode="r").max()),
        "memory_max": lambda: int(in_memory.max()),
    }
    rounds: dict[str, list[float]] = {name: [] for name in tasks}
    for _ in range(repeat):
        found = set()
        for name, task in tasks.items():
            begin = time.perf_counter()
            found.add(task())
            rounds[name].append(time.perf_counter() - begin)
        assert len(found) == 1, found
    return rounds


if __name__ == "__main__":
    main()
