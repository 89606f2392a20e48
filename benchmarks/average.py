"""Cost of an average of checkpoints: read rate compared with the disk's, and peak memory.

    python benchmarks/average.py [--gb 4] [--checkpoints 5] [--rounds 3] [--folder DIR]

Random bf16 checkpoints of one Llama are written in different layouts. Each round reads all files twice from a cold page
cache: once without doing anything (the rate of the disk, the better of 2 and 8 threads), and once with `average`, which
also compares every checksum and writes the result until it is on the disk. `average` runs in a process of its own. Its
peak memory is the kernel's VmHWM, without the page cache. In the end the result is compared with numpy bit for bit. The
disk holds one checkpoint more than there are inputs.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from convert import folder_bytes, forget, llama_config, report, run, weights
from record import machine, write_result

if TYPE_CHECKING:
    from megatron_cpt.config import ModelConfig

_LAYOUTS = ((1, 1), (2, 1), (1, 2), (2, 2), (8, 4))
_READ_BYTES = 1 << 20
_AVERAGE = """
from megatron_cpt.transform.average.average_checkpoints import average_checkpoints
started = time.perf_counter()
average_checkpoints({paths!r}, {output!r}, advance=advance)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gb", type=float, default=4.0, help="size of each checkpoint in GB")
    parser.add_argument("--checkpoints", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="folder for all files; default: a temporary folder")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        write_result("average", measure(Path(folder), options.gb, options.checkpoints, options.rounds))


def measure(folder: Path, gigabytes: float, count: int, rounds: int) -> dict[str, Any]:
    """Measure the read rates of the disk and of `average`, alternating."""
    needed, free = (count + 1) * gigabytes, shutil.disk_usage(folder).free / 1e9
    if free < needed * 1.05:
        sys.exit(f"{folder}: {needed:.1f} GB are needed, {free:.1f} GB are free; choose a smaller --gb")
    paths = []
    for number in range(count):
        paths.append(folder / f"input-{number}")
        write_checkpoint(paths[-1], llama_config(gigabytes), number, _LAYOUTS[number % len(_LAYOUTS)])
        report(f"wrote {paths[-1].name}")
    size = sum(folder_bytes(path) for path in paths)
    disk, found = [], []
    for _ in range(rounds):
        disk.append(max(size / read_all(paths, threads) for threads in (2, 8)))
        report(f"disk: {disk[-1] / 1e9:.2f} GB/s")
        for path in paths:
            forget(path)
        shutil.rmtree(folder / "output", ignore_errors=True)
        found.append(run(_AVERAGE, paths=[str(path) for path in paths], output=str(folder / "output")))
        report(f"average: {size / found[-1]['seconds'] / 1e9:.2f} GB/s")
    seconds = min(each["seconds"] for each in found)
    return {
        "machine": machine(),
        "checkpoints": count,
        "layouts": [f"TP{tensor} x PP{pipeline}" for tensor, pipeline in _LAYOUTS[:count]],
        "input_gigabytes": round(size / 1e9, 3),
        "output_gigabytes": round(folder_bytes(folder / "output") / 1e9, 3),
        "seconds": round(seconds, 2),
        "read_gigabytes_per_second": round(size / seconds / 1e9, 3),
        "disk_gigabytes_per_second": round(max(disk) / 1e9, 3),
        "share_of_disk": round(size / seconds / max(disk), 3),
        "share_of_disk_by_round": [
            round(size / each["seconds"] / rate, 3) for each, rate in zip(found, disk, strict=True)
        ],
        "peak_gigabytes": round(max(each["peak_bytes"] for each in found) / 1e9, 3),
        "equals_numpy_bit_for_bit": equals_numpy(paths, folder / "output"),
        "note": "cold page cache; imports of libraries not counted; all checksums compared; the result is on the disk",
    }


def model_of(config: dict[str, Any]) -> ModelConfig:
    """Return the model section of a config.json."""
    from megatron_cpt.convert.huggingface.config import read_model

    return read_model(config)[1]


def write_checkpoint(folder: Path, config: dict[str, Any], number: int, layout: tuple[int, int]) -> None:
    """Write a checkpoint with random weights that depend on its number, cut for a layout, a piece at a time."""
    import torch

    from megatron_cpt.convert.checkpoint_files import write_records
    from megatron_cpt.convert.mapping.shapes import expected_tensors
    from megatron_cpt.convert.megatron.torch_dist_plan import Target, TensorSpec, plan_files
    from megatron_cpt.convert.megatron.torch_dist_writer import extra_state_keys, write_extra_states, write_file
    from megatron_cpt.convert.source import SourceCheckpoint

    model, target = model_of(config), Target(*layout)
    specs = {name: TensorSpec(shape, torch.bfloat16) for name, shape in expected_tensors(model).items()}

    def read(name: str, first: int, last: int) -> torch.Tensor:
        return weights(f"{number}/{name}", specs[name].shape, first, last)

    source = SourceCheckpoint(kind="torch_dist", family=None, model=model, specs=specs, read=read)
    folder.mkdir()
    written = {
        plan.name: write_file(folder / plan.name, plan, specs, target.tensor, read, lambda num_bytes: None)
        for plan in plan_files(specs, model.layers, target)
    }
    written["__extra_0.distcp"] = write_extra_states(folder / "__extra_0.distcp", extra_state_keys(model.layers))
    write_records(folder, folder.name, source, specs, written, state={})


def read_all(paths: list[Path], threads: int) -> float:
    """Return the seconds that reading all files takes from a cold page cache."""
    for path in paths:
        forget(path)
    files = [file for path in paths for file in sorted(path.iterdir()) if file.is_file()]
    started = time.perf_counter()
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(read_file, files))
    return time.perf_counter() - started


def read_file(path: Path) -> None:
    """Read a file and forget it."""
    piece = memoryview(bytearray(_READ_BYTES))
    with path.open("rb", buffering=0) as file:
        while file.readinto(piece):
            pass


def equals_numpy(paths: list[Path], output: Path) -> bool:
    """Return whether each weight has the bits of numpy's fp32 sum in the order of the inputs, rounded once to bf16."""
    import torch

    from megatron_cpt.convert.source import open_source_checkpoint

    result = open_source_checkpoint(output, verify="none")
    inputs = [open_source_checkpoint(path, verify="none") for path in paths]
    weight = np.float32(1 / len(paths))
    for name, spec in result.specs.items():
        step = max(1, (4 << 20) * spec.shape[0] // spec.num_bytes)
        for first in range(0, spec.shape[0], step):
            last = min(spec.shape[0], first + step)
            terms = [
                weight
                * (each.read(name, first, last).view(torch.int16).numpy().astype(np.int32) << 16).view(np.float32)
                for each in inputs
            ]
            total = terms[0]
            for term in terms[1:]:
                total = total + term
            whole = total.view(np.uint32).astype(np.uint64)
            expected = ((whole + 0x7FFF + ((whole >> 16) & 1)) >> 16).astype(np.uint16)
            if not np.array_equal(result.read(name, first, last).view(torch.int16).numpy().view(np.uint16), expected):
                return False
    return True


if __name__ == "__main__":
    main()
