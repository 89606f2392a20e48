"""Time to the first batch of a run over 2,000 sources and 15T tokens, at the start and on a resume at step 10 million.

    python benchmarks/data_resume.py [--repeat 7] [--folder /fast/disk]

A fresh process (numpy loaded) reads the blend's state from a JSON file, as in a checkpoint, imports
`megatron_cpt.data`, opens every source, builds streams and blend, and reads the first global batch. There is no replay
and no index, so both times must be equal. The counts must grow by exactly the samples of the batch, or the benchmark
fails.

The sources are sparse files of zeros, so the disk is not measured.
"""

from __future__ import annotations

import argparse
import json
import statistics
import struct
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
from data_startup import in_fresh_process, peak_memory
from record import machine, write_result

SEQ_LENGTH, GLOBAL_BATCH, SEED, STEP = 4096, 256, 1234, 10_000_000
NUM_SOURCES, NUM_TOKENS = 2000, 15 * 10**12
TARGET_SECONDS, TARGET_MB = 2.0, 300


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeat", type=int, default=7, help="runs of each kind; the median is reported")
    parser.add_argument("--folder", help="folder for the sparse files (60 TB apparent size, a few MB on disk)")
    options = parser.parse_args()
    names = [f"source{i:04}" for i in range(NUM_SOURCES)]
    shares = np.random.default_rng(SEED).dirichlet(np.ones(NUM_SOURCES))
    weights = dict(zip(names, shares.tolist(), strict=True))
    with tempfile.TemporaryDirectory(prefix="data_resume.", dir=options.folder) as folder:
        for name in names:
            make_source(Path(folder) / name, NUM_TOKENS // NUM_SOURCES)
        runs: dict[str, list[dict[str, Any]]] = {"start": [], "resume": []}
        for what, step in [("start", 0), ("resume", STEP)] * options.repeat:
            state = Path(folder) / "state.json"
            state.write_text(json.dumps(state_after(weights, step)))
            runs[what].append(in_fresh_process(time_first_batch, folder, str(state), weights))
    figures = {what: summary(each) for what, each in runs.items()}
    for what, figure in figures.items():
        print(f"{what:8}{figure['seconds']:8.3f} s{figure['peak_memory_mb']:8.0f} MB   {figure['parts']}")
    write_result(
        "data_resume",
        {
            "what": "seconds from the start of a process to its first batch; medians",
            "machine": machine(),
            "job": {
                "sources": NUM_SOURCES,
                "tokens": NUM_TOKENS,
                "seq_length": SEQ_LENGTH,
                "global_batch": GLOBAL_BATCH,
                "steps": NUM_TOKENS // (SEQ_LENGTH * GLOBAL_BATCH),
                "resumed_at_step": STEP,
            },
            **figures,
            "target": f"under {TARGET_SECONDS} s and {TARGET_MB} MB",
        },
    )


def summary(runs: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "seconds": statistics.median(run["seconds"] for run in runs),
        "seconds_each_run": [run["seconds"] for run in runs],
        "parts": {part: statistics.median(run["parts"][part] for run in runs) for part in runs[0]["parts"]},
        "peak_memory_mb": statistics.median(run["peak_memory_mib"] * 1.048576 for run in runs),
    }


def make_source(prefix: Path, num_tokens: int) -> None:
    """Write a dataset of one document of zeros, in several sequences because the format has int32 sizes."""
    limit = 2**31 - 1
    sizes = [min(limit, num_tokens - start) for start in range(0, num_tokens, limit)]
    pointers = [4 * start for start in range(0, num_tokens, limit)]
    with open(f"{prefix}.bin", "wb") as file:
        file.truncate(4 * num_tokens)
    tables = struct.pack(f"<{len(sizes)}i{len(sizes)}q2q", *sizes, *pointers, 0, len(sizes))
    Path(f"{prefix}.idx").write_bytes(struct.pack("<9sQBQQ", b"MMIDIDX\0\0", 1, 4, len(sizes), 2) + tables)


def state_after(weights: dict[str, float], step: int) -> dict[str, Any]:
    """Return a state of the blend after a step, with rounded shares: exact counts make no difference here."""
    from megatron_cpt.planning.timeline.epochs import (
        split_samples,  # imported here, because the timed processes must not import it with this module
    )

    return {
        "sample": step * GLOBAL_BATCH,
        "counts": split_samples(weights, step * GLOBAL_BATCH),
        "phase": "only",
        "weights": weights,
        "counts_at_blend_start": dict.fromkeys(weights, 0),
    }


def time_first_batch(folder: str, state_file: str, weights: dict[str, float]) -> dict[str, Any]:
    """Time everything that a process does before it can train."""
    marks = [time.perf_counter()]
    from megatron_cpt.data import BlendCursor, IndexedDataset, Loader, PhaseBlend, TokenStream

    marks.append(time.perf_counter())
    streams = [
        TokenStream(name, [IndexedDataset(Path(folder) / name)], seq_length=SEQ_LENGTH, seed=SEED) for name in weights
    ]
    marks.append(time.perf_counter())
    num_samples = NUM_TOKENS // (SEQ_LENGTH * GLOBAL_BATCH) * GLOBAL_BATCH
    cursor = BlendCursor([PhaseBlend("only", 0, num_samples, weights)], list(weights))
    state = json.loads(Path(state_file).read_text())
    cursor.load_state_dict(state)
    marks.append(time.perf_counter())
    with Loader(streams, cursor, global_batch=GLOBAL_BATCH, micro_batch=2, prefetch=1) as loader:
        step = loader.next_step()
        marks.append(time.perf_counter())
    read = Counter(list(weights)[source] for batch in step.micro_batches for source in batch.sources.tolist())
    if Counter(step.counts) - Counter(state["counts"]) != read:
        raise SystemExit("the counts did not grow by the samples of the batch")
    parts = dict(zip(["import", "sources", "state", "first_batch"], np.diff(marks).tolist(), strict=True))
    return {"seconds": marks[-1] - marks[0], "parts": parts} | peak_memory()


if __name__ == "__main__":
    main()
