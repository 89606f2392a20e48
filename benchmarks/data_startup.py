"""Time to the first batch of a run over 1,000 sources and 1T tokens, compared with megatron-core's blending index.

    python benchmarks/data_startup.py            # megatron-core on 1/20 of the run, extrapolated (its time is linear)
    python benchmarks/data_startup.py --full     # megatron-core on the full run: about six minutes and 2.5 GiB

megatron_cpt: a fresh process (numpy loaded) imports `megatron_cpt.data`, opens every source, builds the streams and the
blend, and reads the first global batch (1,152 samples of 4,096 tokens). megatron-core: a fresh process runs
`build_blending_indices` for the samples of that run with equal weights, which rank 0 does before a run with a new blend
starts; its imports and its indices per source are not included. The first batch must come from the sources that the
index of megatron-core names, or the benchmark fails.

The sources are sparse files of zeros, so the disk is not measured: on a cold disk, 1,152 random reads come on top.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import resource
import statistics
import struct
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
from record import machine

RESULT = Path(__file__).parent / "results" / "data_startup.json"
GLOBAL_BATCH, SEQ_LENGTH, SEED = 1152, 4096, 1234
SLICE = 20  # without --full, megatron-core is timed on 1/20 of the run


def main() -> None:
    options = parse_arguments()
    weights = np.random.default_rng(SEED).dirichlet(np.ones(options.sources))
    num_samples = options.sources * options.tokens_per_source // SEQ_LENGTH
    with tempfile.TemporaryDirectory(prefix="data_startup.", dir=options.folder) as folder:
        prefixes = [
            make_source(Path(folder) / f"source{i:04}", options.tokens_per_source) for i in range(options.sources)
        ]
        runs = [in_fresh_process(time_ours, prefixes, weights, num_samples) for _ in range(options.repeat)]
        timed = num_samples if options.full else num_samples // SLICE
        theirs = in_fresh_process(time_theirs, weights, timed)
    check_same_job(runs, theirs)
    ours = min(runs, key=lambda run: abs(run["seconds"] - statistics.median(r["seconds"] for r in runs)))
    scale = num_samples / timed
    result = {
        "what": "seconds from the start to the first batch; megatron-core: only build_blending_indices",
        "date": datetime.date.today().isoformat(),
        "machine": machine(),
        "job": {
            "sources": options.sources,
            "tokens": options.sources * options.tokens_per_source,
            "samples": num_samples,
            "global_batch": GLOBAL_BATCH,
            "seq_length": SEQ_LENGTH,
        },
        "megatron_cpt": {
            "seconds": ours["seconds"],
            "seconds_each_run": [run["seconds"] for run in runs],
            "parts": ours["parts"],
            "peak_memory_mib": ours["peak_memory_mib"],
        },
        "megatron_core": {
            "seconds": theirs["seconds"] * scale,
            "cpu_seconds": theirs["cpu_seconds"] * scale,
            "extrapolated": not options.full,
            "samples_timed": timed,
            "seconds_timed": theirs["seconds"],
            "peak_memory_mib": theirs["peak_memory_mib"],
        },
        "times_faster": theirs["seconds"] * scale / ours["seconds"],
        "times_faster_by_their_cpu_time": theirs["cpu_seconds"] * scale / ours["seconds"],
    }
    print_table(result)
    output = options.output or (RESULT if options.full else None)
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps(result, indent=2) + "\n")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true", help="time megatron-core on the full run, not on 1/20")
    parser.add_argument("--sources", type=int, default=1000)
    parser.add_argument("--tokens-per-source", type=int, default=10**9, help="at most 2^31 - 1")
    parser.add_argument("--repeat", type=int, default=7, help="runs of megatron_cpt; the median is reported")
    parser.add_argument("--folder", help="folder for the sparse files (4 TB apparent size, a few MB on disk)")
    parser.add_argument(
        "--output", type=Path, help=f"JSON file for the result [default with --full: results/{RESULT.name}]"
    )
    return parser.parse_args()


def make_source(prefix: Path, num_tokens: int) -> str:
    """Write a dataset of one document of zeros that takes no disk space."""
    with open(f"{prefix}.bin", "wb") as file:
        file.truncate(4 * num_tokens)
    preamble = struct.pack("<9sQBQQ", b"MMIDIDX\0\0", 1, 4, 1, 2)
    Path(f"{prefix}.idx").write_bytes(preamble + struct.pack("<iqqq", num_tokens, 0, 0, 1))
    return str(prefix)


def in_fresh_process(function: Callable[..., dict[str, Any]], *arguments: Any) -> dict[str, Any]:
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def time_ours(prefixes: list[str], weights: np.ndarray, num_samples: int) -> dict[str, Any]:
    marks = [time.perf_counter()]
    from megatron_cpt.data import BlendCursor, IndexedDataset, Loader, PhaseBlend, TokenStream

    marks.append(time.perf_counter())
    names = [Path(prefix).name for prefix in prefixes]
    datasets = [IndexedDataset(prefix) for prefix in prefixes]
    marks.append(time.perf_counter())
    streams = [
        TokenStream(name, [dataset], seq_length=SEQ_LENGTH, seed=SEED)
        for name, dataset in zip(names, datasets, strict=True)
    ]
    length = math.ceil(num_samples / GLOBAL_BATCH) * GLOBAL_BATCH
    blend = PhaseBlend("only", 0, length, dict(zip(names, weights.tolist(), strict=True)))
    cursor = BlendCursor([blend], names)
    marks.append(time.perf_counter())
    with Loader(streams, cursor, global_batch=GLOBAL_BATCH, micro_batch=2, prefetch=1) as loader:
        step = loader.next_step()
        marks.append(time.perf_counter())
    parts = dict(zip(["import", "open", "streams", "first_batch"], np.diff(marks).tolist(), strict=True))
    sources = np.concatenate([batch.sources for batch in step.micro_batches])
    return {"seconds": marks[-1] - marks[0], "parts": parts, "sources": sources.tolist()} | peak_memory()


def time_theirs(weights: np.ndarray, num_samples: int) -> dict[str, Any]:
    from megatron.core.datasets import helpers_cpp

    sources, indices = np.zeros(num_samples, np.int16), np.zeros(num_samples, np.int64)
    wall, cpu = time.perf_counter(), time.process_time()
    helpers_cpp.build_blending_indices(sources, indices, weights, len(weights), num_samples, False)
    seconds, cpu_seconds = time.perf_counter() - wall, time.process_time() - cpu
    first = sources[:GLOBAL_BATCH].tolist()
    return {"seconds": seconds, "cpu_seconds": cpu_seconds, "sources": first} | peak_memory()


def check_same_job(runs: list[dict[str, Any]], theirs: dict[str, Any]) -> None:
    for run in runs:
        if run["sources"] != theirs["sources"]:
            raise SystemExit(
                "the first batch of megatron_cpt and megatron-core differs in its sources: the times are not comparable"
            )


def peak_memory() -> dict[str, int]:
    return {"peak_memory_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024}


def print_table(result: dict[str, Any]) -> None:
    ours, theirs = result["megatron_cpt"], result["megatron_core"]
    note = " (extrapolated)" if theirs["extrapolated"] else ""
    print(
        f"{result['job']['sources']} sources, {result['job']['tokens']:.3g} tokens, {result['job']['samples']} samples"
    )
    print(f"{'':24}{'seconds':>12}{'peak MiB':>12}")
    print(f"{'megatron_cpt':24}{ours['seconds']:12.3f}{ours['peak_memory_mib']:12}")
    print(f"{'megatron-core':24}{theirs['seconds']:12.3f}{theirs['peak_memory_mib']:12}{note}")
    by_cpu = result["times_faster_by_their_cpu_time"]
    print(f"{result['times_faster']:.0f} times faster ({by_cpu:.0f} by CPU time); megatron_cpt: {ours['parts']}")


if __name__ == "__main__":
    main()
