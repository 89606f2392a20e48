"""Random samples per second from a cold disk and from the page cache, compared with megatron-core's IndexedDataset.

    python benchmarks/data_cold_reads.py [--gigabytes 4] [--samples 4096] [--rounds 3] [--folder /fast/disk]

All readers read identical samples of 4,096 tokens (int32, 16 KiB) in one shuffled order from one `.bin`:

    loader              our loader: its thread announces all samples of a step to the disk before it reads the first
    loader_in_turn      our loader without the announcement: it reads one sample after the other
    pread, mmap         our stream in the process itself, with `pread` (the default) and from a memory map
    their_pread, their_mmap     megatron-core's `IndexedDataset.get`, with `mmap=False` and with `mmap=True`

Each measurement is a fresh process. The readers take turns; the results are medians over the rounds. Cold: the file
is flushed and dropped from the page cache before each measurement, and `mincore` must find less than 1 % of it there,
or the benchmark stops. Only this kernel is cold; the host of a virtual machine may still cache the file. Warm: that
process reads the samples again.
"""

from __future__ import annotations

import argparse
import ctypes
import mmap
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from data_loader import MappedDataset, in_fresh_process
from record import machine, write_result

from megatron_cpt.data import BlendCursor, IndexedDataset, IndexedDatasetWriter, Loader, PhaseBlend, TokenStream

SEQ_LENGTH, GLOBAL, MICRO, SEED, VOCAB = 4096, 256, 8, 1234, 1 << 30
DOCUMENT = 1 << 20  # tokens
MOST_RESIDENT = 0.01


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=4, help="size of the .bin")
    parser.add_argument("--samples", type=int, default=4096, help="samples per measurement")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", help="folder for the dataset, on a disk, not a tmpfs")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="data_cold_reads.", dir=options.folder) as folder:
        prefix = make_source(Path(folder) / "source", int(options.gigabytes * 1e9) // (4 * DOCUMENT))
        rounds = [
            {reader: in_fresh_process(measure, reader, prefix, options.samples) for reader in READERS}
            for _ in range(options.rounds)
        ]
    readers = {reader: summary([each[reader] for each in rounds]) for reader in READERS}
    result = {
        "what": "shuffled samples per second of one process, with a cold page cache and then a warm one; medians",
        "machine": machine(),
        "job": {
            "bin_gigabytes": options.gigabytes,
            "seq_length": SEQ_LENGTH,
            "sample_bytes": 4 * (SEQ_LENGTH + 1),
            "samples": options.samples,
            "samples_a_step": GLOBAL,
        },
        "readers": readers,
        "loader_over": {
            reader: {
                state: statistics.median(each["loader"][state] / each[reader][state] for each in rounds)
                for state in ("cold", "warm")
            }
            for reader in READERS
            if reader != "loader"
        },
    }
    for reader, figures in readers.items():
        cold, warm = figures["cold_samples_per_second"], figures["warm_samples_per_second"]
        megabytes = figures["cold_megabytes_per_second"]
        print(f"{reader:16}{cold:10.0f} samples/s cold ({megabytes:.0f} MB/s){warm:10.0f} warm")
    write_result("data_cold_reads", result)


def summary(runs: list[dict[str, float]]) -> dict[str, Any]:
    cold = statistics.median(run["cold"] for run in runs)
    return {
        "cold_samples_per_second": cold,
        "cold_megabytes_per_second": cold * 4 * (SEQ_LENGTH + 1) / 1e6,
        "cold_each_round": [run["cold"] for run in runs],
        "warm_samples_per_second": statistics.median(run["warm"] for run in runs),
        "resident_before": max(run["resident_before"] for run in runs),
    }


def make_source(prefix: Path, num_documents: int) -> str:
    """Write random tokens, which neither a disk nor its host can compress."""
    rng = np.random.default_rng(SEED)
    with IndexedDatasetWriter(prefix, "<i4") as writer:
        for _ in range(num_documents):
            writer.add_documents(rng.integers(0, VOCAB, DOCUMENT, np.int32), [DOCUMENT])
    return str(prefix)


def measure(reader: str, prefix: str, num_samples: int) -> dict[str, float]:
    """Time one reader in this process."""
    import torch  # noqa: F401 (loaded for all readers before the timer starts)

    read, figures = READERS[reader](prefix, num_samples), {}
    resident = drop_from_cache(f"{prefix}.bin")
    if resident > MOST_RESIDENT:
        raise SystemExit(
            f"{resident:.1%} of the file stayed in the page cache: the reads are not cold; choose another --folder"
        )
    for state in ("cold", "warm"):
        started = time.perf_counter()
        seen = sum(read())
        figures[state] = seen / (time.perf_counter() - started)
    return figures | {"resident_before": resident}


def drop_from_cache(path: str) -> float:
    """Drop a file from the page cache, and return the share of it that is still there."""
    fd = os.open(path, os.O_RDONLY)
    os.fsync(fd)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    libc = ctypes.CDLL(None, use_errno=True)
    with mmap.mmap(fd, 0, prot=mmap.PROT_READ | mmap.PROT_WRITE, flags=mmap.MAP_PRIVATE) as mapped:
        pages = np.zeros(-(-len(mapped) // mmap.PAGESIZE), np.uint8)
        start = ctypes.addressof(ctypes.c_char.from_buffer(mapped))
        size, vector = ctypes.c_size_t(len(mapped)), ctypes.c_void_p(pages.ctypes.data)
        if libc.mincore(ctypes.c_void_p(start), size, vector) != 0:
            raise OSError(ctypes.get_errno(), "mincore")
    os.close(fd)
    return float((pages & 1).mean())


Read = Callable[[], Iterator[int]]


def stream_of(dataset: IndexedDataset) -> TokenStream:
    return TokenStream("source", [dataset], seq_length=SEQ_LENGTH, seed=SEED)


def in_process(dataset: IndexedDataset, num_samples: int) -> Read:
    stream = stream_of(dataset)

    def read() -> Iterator[int]:
        for index in range(num_samples):
            assert stream.read(index).size == SEQ_LENGTH + 1
            yield 1

    return read


class UnannouncedDataset(IndexedDataset):
    """Dataset that does not announce its reads to the disk."""

    def will_read(self, starts: Sequence[int], count: int) -> None:
        """Do nothing."""


def by_loader(dataset: IndexedDataset, num_samples: int) -> Read:
    stream = stream_of(dataset)

    def read() -> Iterator[int]:
        cursor = BlendCursor([PhaseBlend("only", 0, num_samples, {"source": 1.0})], ["source"])
        with Loader([stream], cursor, global_batch=GLOBAL, micro_batch=MICRO, vocab_size=VOCAB) as loader:
            for step in loader:
                yield sum(len(batch.tokens) for batch in step.micro_batches)

    return read


def theirs(prefix: str, num_samples: int, *, mapped: bool) -> Read:
    from megatron.core.datasets.indexed_dataset import IndexedDataset as TheirDataset

    dataset, stream = TheirDataset(prefix, mmap=mapped), stream_of(IndexedDataset(prefix))
    positions = [divmod(stream.locate(k).token_offset, DOCUMENT) for k in range(num_samples)]

    def read() -> Iterator[int]:
        for document, offset in positions:  # samples that cross the end of a document are shortened
            tokens = dataset.get(document, offset, min(SEQ_LENGTH + 1, DOCUMENT - offset))
            assert np.array(tokens).size > 0  # reads the memory map
            yield 1

    return read


READERS: dict[str, Callable[[str, int], Read]] = {
    "loader": lambda prefix, count: by_loader(IndexedDataset(prefix), count),
    "loader_in_turn": lambda prefix, count: by_loader(UnannouncedDataset(prefix), count),
    "pread": lambda prefix, count: in_process(IndexedDataset(prefix), count),
    "mmap": lambda prefix, count: in_process(MappedDataset(prefix), count),
    "their_pread": lambda prefix, count: theirs(prefix, count, mapped=False),
    "their_mmap": lambda prefix, count: theirs(prefix, count, mapped=True),
}


if __name__ == "__main__":
    main()
