"""Tokens per second of the loader in one process, compared with megatron-core's GPTDataset and torch's DataLoader.

    python benchmarks/data_loader.py [--rounds 5] [--samples 8192] [--folder /fast/disk]

All readers read one dataset of int32 tokens from the page cache, in samples of 4,096 tokens and micro-batches of 8, and
return tensors in the process that would train:

    pread               our loader: one thread, one `pread` per sample, every id compared with the vocabulary
    mmap                our loader, but copying from a memory map
    dataset_in_process  megatron-core's GPTDataset, sample by sample in the process itself: no batches, no overlap
    dataloader          GPTDataset behind torch's DataLoader with one worker, as in Megatron-LM

megatron-core is configured for its best speed: no attention mask, no resets, existing index files, no check of ids.
Each measurement is a fresh process. The four readers take turns, so that drift of the machine affects all of them; the
results are medians over the rounds. Memory is the growth of the process's peak after the imports, plus the private
memory of workers. With a memory map, the kernel also counts touched pages of the page cache.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from record import machine, write_result

from megatron_cpt.data import BlendCursor, IndexedDataset, IndexedDatasetWriter, Loader, PhaseBlend, TokenStream

SEQ_LENGTH, MICRO, GLOBAL, VOCAB, SEED = 4096, 8, 64, 256_000, 1234
WARM_UP = 256  # samples before the timer starts, to exclude the start of the worker and first page faults
DOCUMENTS_PER_WRITE = 5000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--samples", type=int, default=8192, help="samples per measurement")
    parser.add_argument("--tokens", type=int, default=64_000_000, help="tokens in the dataset")
    parser.add_argument("--folder", help="folder for the dataset")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="data_loader.", dir=options.folder) as folder:
        prefix = make_source(Path(folder) / "source", options.tokens)
        in_fresh_process(measure, "dataset_in_process", prefix, MICRO)  # builds megatron-core's index files
        rounds = [
            {reader: in_fresh_process(measure, reader, prefix, options.samples) for reader in READERS}
            for _ in range(options.rounds)
        ]
    result = {
        "what": "tokens per second of one process, warm page cache; medians over the rounds",
        "machine": machine(),
        "job": {
            "seq_length": SEQ_LENGTH,
            "micro_batch": MICRO,
            "samples": options.samples,
            "data_set_tokens": options.tokens,
        },
        "readers": {reader: summary([each[reader] for each in rounds]) for reader in READERS},
        "pread_over": {
            reader: statistics.median(
                each["pread"]["tokens_per_second"] / each[reader]["tokens_per_second"] for each in rounds
            )
            for reader in READERS
            if reader != "pread"
        },
        "target": "5 times the DataLoader with one worker",
    }
    for reader, figures in result["readers"].items():
        memory = figures["peak_memory_mib"] + figures["worker_memory_mib"]
        print(f"{reader:20}{figures['tokens_per_second'] / 1e6:10.1f} M tokens/s{memory:8.0f} MiB")
    for reader, ratio in result["pread_over"].items():
        print(f"pread is {ratio:.2f} times {reader}")
    write_result("data_loader", result)


def summary(runs: list[dict[str, float]]) -> dict[str, Any]:
    return {
        "tokens_per_second": statistics.median(run["tokens_per_second"] for run in runs),
        "tokens_per_second_each_round": [run["tokens_per_second"] for run in runs],
        "peak_memory_mib": statistics.median(run["peak_memory_mib"] for run in runs),
        "worker_memory_mib": statistics.median(run["worker_memory_mib"] for run in runs),
    }


def make_source(prefix: Path, num_tokens: int) -> str:
    """Write random tokens in documents of about 1,000 tokens, with a long tail as in text."""
    rng = np.random.default_rng(SEED)
    lengths = np.minimum(rng.lognormal(6.5, 1.0, num_tokens // 400).astype(int) + 10, 20_000)
    lengths = lengths[: np.searchsorted(lengths.cumsum(), num_tokens)]
    with IndexedDatasetWriter(prefix, "<i4") as writer:
        for first in range(0, len(lengths), DOCUMENTS_PER_WRITE):
            part = lengths[first : first + DOCUMENTS_PER_WRITE]
            writer.add_documents(rng.integers(0, VOCAB, part.sum()), part)
    return str(prefix)


def in_fresh_process(function: Callable[..., dict[str, float]], *arguments: Any) -> dict[str, float]:
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def measure(reader: str, prefix: str, num_samples: int) -> dict[str, float]:
    """Time one reader in this process."""
    import torch  # noqa: F401 (loaded for all readers before memory is measured)
    from megatron.core.datasets import gpt_dataset  # noqa: F401

    before = peak_memory_mib()
    samples = READERS[reader](prefix, WARM_UP + num_samples)
    seen = 0
    while seen < WARM_UP:
        seen += next(samples)
    started, first = time.perf_counter(), seen
    while seen < WARM_UP + num_samples:
        seen += next(samples)
    seconds = time.perf_counter() - started
    workers = [child.memory_full_info().uss / 2**20 for child in psutil.Process().children()]
    samples.close()
    return {
        "tokens_per_second": (seen - first) * SEQ_LENGTH / seconds,
        "peak_memory_mib": peak_memory_mib() - before,
        "worker_memory_mib": sum(workers),
    }


def peak_memory_mib() -> float:
    """Return the largest resident set so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


class MappedDataset(IndexedDataset):
    """Dataset that copies tokens from a memory map."""

    def __init__(self, prefix: str) -> None:
        super().__init__(prefix)
        self._map = np.memmap(f"{prefix}.bin", dtype=self.dtype, mode="r")

    def read_rows(self, starts: Sequence[int], rows: Sequence[np.ndarray]) -> None:
        """See `IndexedDataset.read_rows`."""
        for start, row in zip(starts, rows, strict=True):
            row[:] = self._map[start : start + row.size]


def read_ours(dataset: IndexedDataset, num_samples: int) -> Iterator[int]:
    """Yield the number of samples of each micro-batch of the loader."""
    import torch

    stream = TokenStream("source", [dataset], seq_length=SEQ_LENGTH, seed=SEED)
    steps = -(-num_samples // GLOBAL) + 4
    cursor = BlendCursor([PhaseBlend("only", 0, steps * GLOBAL, {"source": 1.0})], ["source"])
    with Loader([stream], cursor, global_batch=GLOBAL, micro_batch=MICRO, vocab_size=VOCAB) as loader:
        for step in loader:
            for batch in step.micro_batches:
                arrays = (batch.tokens, batch.labels, batch.loss_mask, batch.position_ids)
                assert all(torch.from_numpy(array).is_contiguous() for array in arrays)
                yield MICRO


class Tokenizer:
    """Attributes of a tokenizer that GPTDataset needs."""

    vocab_size, eod, pad, unique_identifiers = VOCAB, 0, -1, {"name": "none"}


def read_theirs(prefix: str, num_samples: int, *, in_process: bool) -> Iterator[int]:
    """Yield the number of samples of each micro-batch of the DataLoader; 1 per sample of the dataset in process."""
    import torch
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
    from megatron.core.datasets.indexed_dataset import IndexedDataset as TheirDataset
    from megatron.core.datasets.utils import Split

    config = GPTDatasetConfig(
        random_seed=SEED,
        sequence_length=SEQ_LENGTH,
        blend=([prefix], None),
        split="1,0,0",
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
        tokenizer=Tokenizer(),
        path_to_cache=f"{prefix}.cache",
    )
    indexed = TheirDataset(prefix)
    documents = np.arange(len(indexed), dtype=np.int32)
    dataset = GPTDataset(
        indexed, prefix, documents, 1 << 16, Split.train, config
    )  # as many samples as any --samples needs
    assert num_samples <= len(dataset), "--samples: more than the index of 65,536"
    if in_process:
        for sample in range(num_samples):
            assert dataset[sample]["tokens"].shape == (SEQ_LENGTH,)
            yield 1
        return
    fork = "fork"  # torch's default on Linux, but not in this process, which was spawned
    for batch in torch.utils.data.DataLoader(dataset, batch_size=MICRO, num_workers=1, multiprocessing_context=fork):
        assert batch["tokens"].shape == (MICRO, SEQ_LENGTH)
        yield MICRO


READERS: dict[str, Callable[[str, int], Iterator[int]]] = {
    "pread": lambda prefix, count: read_ours(IndexedDataset(prefix), count),
    "mmap": lambda prefix, count: read_ours(MappedDataset(prefix), count),
    "dataset_in_process": lambda prefix, count: read_theirs(prefix, count, in_process=True),
    "dataloader": lambda prefix, count: read_theirs(prefix, count, in_process=False),
}


if __name__ == "__main__":
    main()
