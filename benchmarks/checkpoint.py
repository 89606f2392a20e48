"""Cost of saving and loading, compared with the disk itself and with megatron-core's save, and for a training step.

    python benchmarks/checkpoint.py [--gb 0.5] [--rounds 12] [--folder /scratch]

One process, one model in bf16 with the distributed optimizer: 14 bytes per parameter. Every round runs all variants one
after the other and starts with another one each time, so that drift of the machine and bursts of the disk affect all of
them. A ratio divides the medians over the rounds. Reads are cold: the pages of a file are dropped first. Memory is the
peak of the resident set minus the resident set before.

- raw: write the same number of bytes from memory, with the same number of files and threads as `saved`, and fsync;
- megatron_core: `dist_checkpointing.save` with its layout-independent optimizer format;
- unhashed: `saved` with a checksum function that does nothing;
- saved: a save of this package;
- background: the same with `checkpoint.async`, during a forward and backward pass of 1,024 tokens. `wait` is the time
  that the step stands still, before the pass and before the update. `longer` is the time of the step minus the time
  of a pass alone, which includes the processor time and memory bandwidth that the save takes. `rest` is the time from
  there to the publication;
- raw_read: read the same files, one thread per file;
- load: a load that compares every checksum;
- load_unverified: a load with `checkpoint.verify: none`.
"""

from __future__ import annotations

import argparse
import os
import queue
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from record import machine, write_result

from megatron_cpt.backend import cpu, process_groups
from megatron_cpt.config import ParallelConfig, RunConfig

GIB = 1 << 30
CHUNK = 16 << 20
BYTES_PER_PARAMETER = 14
SEQ_LENGTH = 128
VOCAB = 8192


def main() -> None:
    """Run the benchmark and write its result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gb", type=float, default=0.5, help="size of the state")
    parser.add_argument("--rounds", type=int, default=12, help="a multiple of 12")
    parser.add_argument("--folder", help="a folder on the disk to measure; default: the temporary one")
    options = parser.parse_args()
    cpu.install()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder, process_groups(ParallelConfig()):
        rounds = measure(Path(folder), options.gb, options.rounds)
    ratios = {
        "save_over_raw": ratio(rounds, "saved", "raw"),
        "save_over_megatron_core": ratio(rounds, "saved", "megatron_core"),
        "checksums_over_none": ratio(rounds, "saved", "unhashed"),
        "step_wait_over_save": ratio(rounds, "background_wait", "saved"),
        "step_longer_over_save": ratio(rounds, "background_longer", "saved"),
        "load_over_raw_read": ratio(rounds, "load", "raw_read"),
        "load_unverified_over_raw_read": ratio(rounds, "load_unverified", "raw_read"),
    }
    for name, value in ratios.items():
        print(f"{name}: {value:.3f}")
    write_result(
        "checkpoint",
        {
            "machine": machine(),
            "what": f"a state of {rounds[0]['bytes'] / GIB:.2f} GiB, one process, bf16, distributed optimizer",
            "ratios": ratios,
            "targets": {
                "save_over_raw": 1.3,
                "checksums_over_none": 1.05,
                "step_wait_over_save": 0.05,
                "load_over_raw_read": 1.3,
            },
            "rounds": rounds,
        },
    )


def ratio(rounds: list[dict[str, Any]], a: str, b: str) -> float:
    """Divide medians: a disk with bursts favors the first variant, and over 12 rounds each is equally often first."""
    return statistics.median(r[a]["seconds"] for r in rounds) / statistics.median(r[b]["seconds"] for r in rounds)


def measure(folder: Path, gigabytes: float, num_rounds: int) -> list[dict[str, Any]]:
    """Return seconds, GB per second and peak memory of every variant, per round; the first round is a warm-up."""
    from megatron_cpt.checkpoint.saving.saver import Saver

    chunks, optimizer = build(gigabytes)
    savers = {name: Saver(folder / name, chunks, optimizer, in_background=name == "background") for name in OURS}
    rounds = [measure_round(folder, savers, chunks, optimizer, number) for number in range(num_rounds + 1)][1:]
    for saver in savers.values():
        saver.close()
    return rounds


def measure_round(folder: Path, savers: dict[str, Any], chunks: Any, optimizer: Any, number: int) -> dict[str, Any]:
    """Run every variant once; the round's number selects the first writing and the first reading variant."""
    from megatron_cpt.checkpoint.loading.find_valid import find_valid
    from megatron_cpt.checkpoint.loading.load import load_training
    from megatron_cpt.checkpoint.manifest import Verify
    from megatron_cpt.checkpoint.record import Record

    record = Record({"format_version": 1}, "name: benchmark\n", {})
    size = sum(BYTES_PER_PARAMETER * parameter.numel() for chunk in chunks for parameter in chunk.parameters())
    done: dict[str, Any] = {}

    def save_unhashed() -> None:
        with without_checksums():
            savers["unhashed"].save(1, record)

    def load(how: Verify) -> None:
        load_training(find_valid(path, how), chunks, optimizer, how, with_rng=True)

    writes: list[tuple[str, Callable[[], Any]]] = [
        ("saved", lambda: savers["saved"].save(1, record)),
        ("unhashed", save_unhashed),
        ("raw", lambda: write_raw(folder / "raw", size)),
        ("megatron_core", lambda: save_with_megatron_core(folder / "megatron_core", chunks, optimizer)),
    ]
    for name in (*(name for name, _ in writes), "background"):  # so that nothing is deleted while a variant is timed
        shutil.rmtree(folder / name, ignore_errors=True)
    for name, write in rotated(writes, number):
        timed(done, name, write)
    path = next((folder / "saved").glob("step-*"))
    measure_background(done, savers["background"], record, chunks)
    reads: list[tuple[str, Callable[[], Any]]] = [
        ("raw_read", lambda: read_raw(path)),
        ("load", lambda: load("full")),
        ("load_unverified", lambda: load("none")),
    ]
    for name, read in rotated(reads, number):
        drop_pages(path)
        timed(done, name, read)
    for name, values in done.items():
        values["gb_per_second"] = size / 1e9 / values["seconds"]
        print(f"{name:18} {values['seconds']:7.2f} s {values['gb_per_second']:6.2f} GB/s", end="")
        print(f" {values['peak_gib']:+6.2f} GiB" if "peak_gib" in values else "")
    return {"bytes": size, **done}


def rotated(variants: list[Any], number: int) -> list[Any]:
    """Return the variants in an order that starts with another one each round."""
    first = number % len(variants)
    return variants[first:] + variants[:first]


def measure_background(done: dict[str, Any], saver: Any, record: Any, chunks: Any) -> None:
    """Time a save during a forward and backward pass."""

    def forward_and_backward() -> None:
        import torch

        tokens = torch.randint(VOCAB, (8, SEQ_LENGTH))
        positions = torch.arange(SEQ_LENGTH).expand_as(tokens)
        chunks[0](tokens, positions, None, labels=tokens).mean().backward()

    timed(done, "pass", forward_and_backward)
    os.sync()
    begin = timed_alone(lambda: saver.save(1, record))
    beside = timed_alone(forward_and_backward)
    end = timed_alone(saver.wait_for_copy)
    done["background_wait"] = {"seconds": begin + end}
    done["background_longer"] = {"seconds": begin + beside + end - done["pass"]["seconds"]}
    timed(done, "background_rest", saver.finish)


OURS = ("saved", "unhashed", "background")


def build(gigabytes: float) -> tuple[Any, Any]:
    """Return a model and its optimizer after one step; their state has about this size."""
    from megatron_cpt.backend import seed_everything
    from megatron_cpt.model.build_model import build_model
    from megatron_cpt.optim.build_optimizer import build_optimizer

    hidden = 1024
    layers = max(1, round((gigabytes * GIB / BYTES_PER_PARAMETER - 2 * VOCAB * hidden) / (12 * hidden**2)))
    config = RunConfig.model_validate(
        {
            "name": "checkpoint-benchmark",
            "output": "unused",
            "model": {"layers": layers, "hidden": hidden, "ffn_hidden": 4 * hidden, "heads": 16, "vocab": VOCAB},
            "seq_length": SEQ_LENGTH,
            "batch": {"global": 1},
            "tokens": SEQ_LENGTH,
            "schedule": {"max_lr": 1e-4},
            "sources": {"none": {"path": "unused"}},
            "phases": [{"name": "only", "blend": {"none": 1.0}}],
        }
    )
    seed_everything(config.seed, pipeline_rank=0)
    model = build_model(config)
    optimizer = build_optimizer(config.optimizer, config.schedule, config.parallel, config.precision, model.chunks)
    for chunk in model.chunks:  # no data is needed: random gradients give moments that do not compress
        for parameter in chunk.parameters():
            parameter.main_grad.normal_()
    optimizer.step()
    return model.chunks, optimizer


def timed(done: dict[str, Any], name: str, work: Callable[[], Any]) -> Any:
    """Run a variant; record its seconds and its peak memory."""
    os.sync()  # the previous variant's unwritten pages must not count for this one
    before = reset_peak()
    started = time.perf_counter()
    result = work()
    done[name] = {"seconds": time.perf_counter() - started, "peak_gib": (peak() - before) / GIB}
    return result


def timed_alone(work: Callable[[], Any]) -> float:
    """Return the seconds that a call takes."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def reset_peak() -> int:
    """Reset the peak of the resident set; return the resident set in bytes."""
    Path("/proc/self/clear_refs").write_text("5")
    return peak()


def peak() -> int:
    """Return the peak of the resident set in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith("VmHWM")))


def write_raw(folder: Path, size: int) -> None:
    """Write the same number of bytes, files and threads as a save, without anything else."""
    folder.mkdir(exist_ok=True)
    content = os.urandom(CHUNK)

    def write(name: str) -> None:
        with open(folder / name, "wb", buffering=0) as file:
            for start in range(0, size // 2, CHUNK):
                file.write(memoryview(content)[: min(CHUNK, size // 2 - start)])
            os.fsync(file.fileno())

    with ThreadPoolExecutor(2) as threads:
        list(threads.map(write, ("0", "1")))


def read_raw(folder: Path) -> None:
    """Read the files of a folder, one thread per file."""

    def read(path: Path) -> None:
        buffer = bytearray(CHUNK)
        with open(path, "rb", buffering=0) as file:
            while file.readinto(buffer):
                pass

    with ThreadPoolExecutor(2) as threads:
        list(threads.map(read, folder.iterdir()))


def drop_pages(folder: Path) -> None:
    """Drop the pages of a folder's files, so that the next read comes from the disk."""
    for path in folder.iterdir():
        with open(path, "rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def save_with_megatron_core(folder: Path, chunks: Any, optimizer: Any) -> None:
    """Save as Megatron-LM does with `--dist-ckpt-optim-fully-reshardable`; its files are fsynced, too."""
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    from megatron_cpt.checkpoint.state import state_dicts

    if filesystem_async._results_queue is None:  # otherwise the time to start a process for it would count
        filesystem_async._results_queue = queue.Queue()
    folder.mkdir()
    model = state_dicts.model_state(chunks)
    metadata = {"distrib_optim_sharding_type": "fully_reshardable"}
    state = {**model, "optimizer": optimizer.sharded_state_dict(model, metadata=metadata)}
    dist_checkpointing.save(state, str(folder))


class without_checksums:  # noqa: N801 - used as a context manager
    """Context in which the writer's checksum does nothing."""

    class _Nothing:
        def update(self, data: Any) -> None:
            pass

        def hexdigest(self) -> str:
            return ""

    def __enter__(self) -> None:
        from megatron_cpt.checkpoint.saving import torch_save

        self._usual = torch_save.Checksum
        torch_save.Checksum = self._Nothing  # type: ignore[assignment, misc]

    def __exit__(self, *_: object) -> None:
        from megatron_cpt.checkpoint.saving import torch_save

        torch_save.Checksum = self._usual  # type: ignore[misc]


if __name__ == "__main__":
    main()
