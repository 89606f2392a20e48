"""Cost of a conversion, compared with transformers on a model that fits in memory, and with `cp` on Nemotron-4 15B.

    python benchmarks/convert.py [--gb 1]              # import + export against from_pretrained + save_pretrained
    python benchmarks/convert.py --nemotron-15b [--layers 32] [--folder DIR]

The first command measures a random Llama of about that size. It alternates `convert import` plus `convert export` with
`from_pretrained` plus `save_pretrained`. Each runs in its own process, whose peak memory is the kernel's VmHWM, without
the page cache.

The second command creates a random Hugging Face folder with the shapes of the 15B, imports it for TP8 x PP4 and exports
it. `cp` and `fsync` of the same bytes run before and after. The disk holds at most two copies of the model (62.6 GB for
all layers). By the time of the comparison the source is deleted, so the export is compared with weights that are
generated again: they follow from the names of the tensors. The bytes are random, so no file system compresses them or
skips zeros. Each step begins with a cold page cache.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from record import machine, write_result

if TYPE_CHECKING:
    import torch

_BLOCK = 1 << 23  # random elements that all weights are made of, 16 MiB
_PART_BYTES = 64 << 20

_PROGRAM = """
import json, sys, threading, time
lock, done, shown = threading.Lock(), 0, 0
def advance(count, total):
    global done, shown
    with lock:
        done += count
        if 10 * done // total > shown:
            shown = 10 * done // total
            print(f"  {{10 * shown}} %", file=sys.stderr, flush=True)
{body}
peak = next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(json.dumps({{"seconds": time.perf_counter() - started, "peak_bytes": peak}}))
"""
_IMPORT = """
from pathlib import Path
from megatron_cpt.convert.importer import ImportOptions, import_checkpoint
from megatron_cpt.convert.megatron.torch_dist_plan import Target
started = time.perf_counter()
options = ImportOptions(target=Target({tensor}, {pipeline}))
import_checkpoint(Path({source!r}), Path({target!r}), options, advance=advance)
"""
_EXPORT = """
from pathlib import Path
from megatron_cpt.convert.exporter import ExportOptions, export_checkpoint
started = time.perf_counter()
export_checkpoint(Path({source!r}), Path({target!r}), ExportOptions(verify={verify!r}), advance=advance)
"""
_TRANSFORMERS = """
import os
from pathlib import Path
from transformers import LlamaForCausalLM
started = time.perf_counter()
model = LlamaForCausalLM.from_pretrained({source!r}, dtype="auto")
model.save_pretrained({target!r}, max_shard_size="5GB")
for path in Path({target!r}).iterdir():
    handle = os.open(path, os.O_RDONLY)
    os.fsync(handle)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gb", type=float, default=1.0, help="size of the Llama in GB")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--nemotron-15b", action="store_true")
    parser.add_argument("--layers", type=int, default=32, help="number of layers; fewer for a smaller disk")
    parser.add_argument("--folder", type=Path, help="folder for all files; default: a temporary folder")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        if options.nemotron_15b:
            name = "convert_15b" if options.layers == 32 else f"convert_15b_{options.layers}_layers"
            write_result(name, measure_15b(Path(folder), options.layers))
        else:
            write_result("convert", measure_against_transformers(Path(folder), options.gb, options.rounds))


def run(body: str, **values: Any) -> dict[str, float]:
    """Run a program in its own process; return its seconds (without imports) and its peak memory."""
    program = _PROGRAM.format(body=body.format(**values))
    result = subprocess.run([sys.executable, "-c", program], check=True, stdout=subprocess.PIPE, text=True)
    found: dict[str, float] = json.loads(result.stdout.splitlines()[-1])
    return found


def llama_config(gigabytes: float) -> dict[str, Any]:
    """Return the config.json of a Llama of about this size in bf16."""
    hidden, ffn, vocab = 2048, 5504, 32_000
    layer_bytes = 2 * (hidden * (hidden + 2 * 512) + hidden * hidden + 3 * hidden * ffn)
    layers = max(1, round((gigabytes * 1e9 - 4 * vocab * hidden) / layer_bytes))
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "num_hidden_layers": layers,
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "vocab_size": vocab,
        "max_position_embeddings": 4096,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    }


def nemotron_config(layers: int) -> dict[str, Any]:
    """Return the config.json of Nemotron-4 15B."""
    from megatron_cpt.config import ModelConfig
    from megatron_cpt.config.presets import preset
    from megatron_cpt.convert.huggingface.config import to_hf_config
    from megatron_cpt.convert.mapping.families import NEMOTRON

    return to_hf_config(NEMOTRON, ModelConfig(**{**preset("nemotron4_15b"), "layers": layers}), "bfloat16")


def hf_shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Return the shape of every tensor of a Hugging Face folder with this config."""
    from megatron_cpt.convert.huggingface.config import read_model
    from megatron_cpt.convert.mapping.resolve import resolve

    family, model = read_model(config)
    return {name: shape for rule in resolve(family, model) for name, shape in zip(rule.hf, rule.hf_shapes, strict=True)}


def make_folder(folder: Path, config: dict[str, Any]) -> int:
    """Write a Hugging Face folder with random bf16 weights, a part at a time; return its size in bytes."""
    import torch

    from megatron_cpt.convert.huggingface.writer import HfWriter

    shapes = hf_shapes(config)
    writer = HfWriter(folder, {name: (shape, torch.bfloat16) for name, shape in shapes.items()})
    for name, shape in shapes.items():
        for first, last in parts(shape):
            writer.write_rows(name, first, weights(name, shape, first, last))
    (writer.folder / "config.json").write_text(json.dumps(config))
    writer.finish()
    return writer.total_bytes


def parts(shape: tuple[int, ...]) -> Iterator[tuple[int, int]]:
    """Yield rows [first, last) of a bf16 tensor, in parts of at most 64 MiB."""
    step = max(1, _PART_BYTES // (2 * math.prod(shape[1:])))
    for first in range(0, shape[0], step):
        yield first, min(shape[0], first + step)


@cache
def random_block() -> np.ndarray[Any, np.dtype[np.uint16]]:
    """Return random bf16 numbers between 2**-63 and 2 of both signs, repeated once so that any start is possible."""
    bits = np.random.default_rng(0).integers(0, 1 << 16, size=_BLOCK, dtype=np.uint16)
    return np.tile((bits & 0xBFFF) | 0x2000, 2)


def weights(name: str, shape: tuple[int, ...], first: int, last: int) -> torch.Tensor:
    """Return rows of a tensor: the random block, with a start and flipped bits that depend on name and segment."""
    import torch

    width = math.prod(shape[1:])
    bits = np.empty((last - first) * width, np.uint16)
    position, end = first * width, last * width
    while position < end:
        segment, inside = divmod(position, _BLOCK)
        count = min(_BLOCK - inside, end - position)
        key = int.from_bytes(hashlib.blake2b(f"{name}/{segment}".encode(), digest_size=8).digest(), "little")
        start = inside + (key >> 16) % _BLOCK
        # 0x9FFF keeps the two bits that bound the exponent
        np.bitwise_xor(
            random_block()[start : start + count],
            np.uint16(key & 0x9FFF),
            out=bits[position - first * width : position - first * width + count],
        )
        position += count
    return torch.from_numpy(bits.view(np.int16)).view(torch.bfloat16).reshape(last - first, *shape[1:])


def measure_against_transformers(folder: Path, gigabytes: float, rounds: int) -> dict[str, Any]:
    """Measure seconds and peak memory of both, alternating."""
    config = llama_config(gigabytes)
    size = make_folder(folder / "hf", config)
    found: dict[str, list[dict[str, float]]] = {"import": [], "export": [], "transformers": []}
    for _ in range(rounds):
        places = {"tensor": 1, "pipeline": 1}
        found["import"].append(run(_IMPORT, source=str(folder / "hf"), target=str(folder / "ckpt"), **places))
        found["export"].append(run(_EXPORT, source=str(folder / "ckpt"), target=str(folder / "back"), verify="full"))
        found["transformers"].append(run(_TRANSFORMERS, source=str(folder / "hf"), target=str(folder / "transformers")))
        for name in ("ckpt", "back", "transformers"):
            shutil.rmtree(folder / name)
    return {
        "machine": machine(),
        "model": f"random Llama, {config['num_hidden_layers']} layers, bf16",
        "gigabytes": size / 1e9,
        **{name: summary(runs, size) for name, runs in found.items()},
        "note": "each in its own process, imports of libraries not counted, all written bytes on the disk",
    }


def summary(runs: list[dict[str, float]], size: int) -> dict[str, float]:
    """Return the seconds of the fastest run and the largest peak."""
    seconds = min(run["seconds"] for run in runs)
    return {
        "seconds": round(seconds, 2),
        "gigabytes_per_second": round(size / 1e9 / seconds, 3),
        "peak_gigabytes": round(max(run["peak_bytes"] for run in runs) / 1e9, 3),
    }


def measure_15b(folder: Path, layers: int) -> dict[str, Any]:
    """Measure import for TP8 x PP4, export, and `cp` of the same bytes."""
    config = nemotron_config(layers)
    size = 2 * sum(math.prod(shape) for shape in hf_shapes(config).values())
    needed, free = 2 * size + (128 << 20), shutil.disk_usage(folder).free
    if free < needed:
        sys.exit(f"{folder}: {needed / 1e9:.1f} GB are needed, {free / 1e9:.1f} GB are free; choose fewer --layers")
    source, checkpoint, back, copy = (folder / name for name in ("hf", "ckpt", "back", "copy"))
    result: dict[str, Any] = {"machine": machine(), "layers": layers, "gigabytes": size / 1e9}
    disk = [0.0]

    def step(title: str, action: Any) -> Any:
        """Run an action with a cold page cache and report its seconds."""
        forget(folder)
        started = time.perf_counter()
        done = action()
        seconds = time.perf_counter() - started
        disk[0] = max(disk[0], folder_bytes(folder) / 1e9)
        report(f"{title}: {seconds:.1f} s, {size / 1e9 / seconds:.2f} GB/s")
        return done

    def export(verify: str) -> dict[str, float]:
        found = run(_EXPORT, source=str(checkpoint), target=str(back), verify=verify)
        return summary([found], size)

    report(f"{layers} layers, {size / 1e9:.1f} GB, {free / 1e9:.1f} GB free")
    step("making the folder", lambda: make_folder(source, config))
    copying = step("cp", lambda: copy_folder(source, copy))
    shutil.rmtree(copy)
    places = {"tensor": 8, "pipeline": 4}
    imported = step("import", lambda: run(_IMPORT, source=str(source), target=str(checkpoint), **places))
    shutil.rmtree(source)
    result |= {"cp": copying, "import": summary([imported], size)}
    result["export"] = step("export", lambda: export("full"))
    result["equal_to_the_byte"] = step("comparing", lambda: is_equal(back, config))
    shutil.rmtree(back)
    result["export_unverified"] = step("export without verification", lambda: export("none"))
    shutil.rmtree(checkpoint)
    result["cp_again"] = step("cp again", lambda: copy_folder(back, copy))
    mean = (result["cp"]["seconds"] + result["cp_again"]["seconds"]) / 2
    names = ("import", "export", "export_unverified")
    return {
        **result,
        "times_cp": {name: round(result[name]["seconds"] / mean, 2) for name in names},
        "peak_disk_gigabytes": round(disk[0], 2),
        "note": "cp with fsync, once before and once after; each step from a cold page cache; imports of "
        "libraries not counted; export verifies the checkpoint's checksums while it reads",
    }


def report(line: str) -> None:
    """Print a line of progress to stderr."""
    print(f"{time.strftime('%H:%M:%S')} {line}", file=sys.stderr, flush=True)


def copy_folder(source: Path, target: Path) -> dict[str, float]:
    """Measure `cp` until the bytes are on the disk."""
    started = time.perf_counter()
    subprocess.run(["cp", "-r", str(source), str(target)], check=True)
    sync_files(target)
    seconds = time.perf_counter() - started
    return {
        "seconds": round(seconds, 2),
        "gigabytes_per_second": round(folder_bytes(target) / 1e9 / seconds, 3),
    }


def is_equal(folder: Path, config: dict[str, Any]) -> bool:
    """Return True if a folder holds exactly the weights of `make_folder`, as read by the safetensors package."""
    import torch
    from safetensors import safe_open

    shapes = hf_shapes(config)
    seen = []
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as shard:
            for name in shard.keys():  # noqa: SIM118 - not a dict
                seen.append(name)
                if name not in shapes or tuple(shard.get_slice(name).get_shape()) != shapes[name]:
                    return False
                for first, last in parts(shapes[name]):
                    found = shard.get_slice(name)[first:last]
                    expected = weights(name, shapes[name], first, last)
                    if found.dtype != expected.dtype:
                        return False
                    if not torch.equal(found.view(torch.int16), expected.view(torch.int16)):
                        return False
    return sorted(seen) == sorted(shapes)


def folder_bytes(folder: Path) -> int:
    """Return the disk space of the files in a folder."""
    return sum(file.stat().st_blocks * 512 for file in folder.rglob("*") if file.is_file())


def forget(folder: Path) -> None:
    """Drop the files of a folder from the page cache."""
    sync_files(folder)
    for path in folder.rglob("*"):
        if path.is_file():
            handle = os.open(path, os.O_RDONLY)
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(handle)


def sync_files(folder: Path) -> None:
    """Wait until the files of a folder are on the disk; unlike `sync`, no other files."""
    for path in folder.rglob("*"):
        if path.is_file():
            handle = os.open(path, os.O_RDONLY)
            os.fsync(handle)
            os.close(handle)


if __name__ == "__main__":
    main()
