"""Memory and time of a growth from the shapes of Minitron-4B to the shapes of Nemotron-4 15B, without the proof.

    python benchmarks/grow_memory.py [--layers 1] [--vocab 32000] [--folder DIR]

The weights are random, in bf16. With `--layers 32 --vocab 256000` the source takes 9 GB and the result 31 GB. Memory
does not depend on the numbers of layers and tokens, because tensors are streamed in pieces. The growth runs in its own
process, whose peak is the kernel's VmHWM. Noise is on. 24 heads in 8 groups become 48 in 8, and 9,216 neurons become
24,576, which is no multiple.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import yaml
from record import machine, write_result
from safetensors.torch import save_file

from megatron_cpt.config import ModelConfig
from megatron_cpt.config.presets import preset
from megatron_cpt.convert.huggingface.config import to_hf_config
from megatron_cpt.convert.importer import import_checkpoint
from megatron_cpt.convert.mapping.families import NEMOTRON
from megatron_cpt.convert.mapping.resolve import resolve

SMALL = {"hidden": 3072, "ffn_hidden": 9216, "heads": 24, "kv_groups": 8, "head_dim": 128}
LARGE = {"hidden": 6144, "ffn_hidden": 24576, "heads": 48, "kv_groups": 8}
_PROGRAM = """
import json, sys
from megatron_cpt.transform.grow.grow_checkpoint import GrowOptions, grow_checkpoint
report = grow_checkpoint(*sys.argv[1:], GrowOptions(should_prove=False))
peak = next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(json.dumps({"seconds": report.seconds, "peak_bytes": peak, "written_bytes": report.num_bytes}))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=1, help="layers of both models")
    parser.add_argument("--vocab", type=int, default=32000, help="tokens of both models")
    parser.add_argument("--folder", type=Path, help="an empty folder on the disk to measure")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        result = measure(Path(folder), options.layers, options.vocab)
    for key, value in result.items():
        print(f"{key}: {value:,.2f}")
    write_result("grow_memory", {"layers": options.layers, "vocab": options.vocab, **result, "machine": machine()})


def measure(folder: Path, layers: int, vocab: int) -> dict[str, float]:
    """Make a random small model, grow it, and return GB and seconds."""
    small = ModelConfig.model_validate({**preset("nemotron4_15b"), **SMALL, "layers": layers, "vocab": vocab})
    _write_random_model(folder / "hf", small)
    import_checkpoint(folder / "hf", folder / "small")
    (folder / "large.yaml").write_text(yaml.safe_dump(LARGE))
    arguments = [str(folder / name) for name in ("small", "large.yaml", "large")]
    done = subprocess.run(
        [sys.executable, "-c", _PROGRAM, *arguments], check=True, stdout=subprocess.PIPE, text=True
    ).stdout
    found = json.loads(done)
    return {
        "peak_memory_gb": found["peak_bytes"] / 1e9,
        "seconds": found["seconds"],
        "written_gb": found["written_bytes"] / 1e9,
        "gb_per_second": found["written_bytes"] / 1e9 / found["seconds"],
    }


def _write_random_model(folder: Path, model: ModelConfig) -> None:
    folder.mkdir()
    generator, places = torch.Generator().manual_seed(0), {}
    for number, rule in enumerate(resolve(NEMOTRON, model)):
        tensors = {
            name: torch.randn(shape, generator=generator).mul_(0.02).bfloat16()
            for name, shape in zip(rule.hf, rule.hf_shapes, strict=True)
        }
        name = f"model-{number:05d}.safetensors"
        save_file(tensors, folder / name)
        places |= dict.fromkeys(tensors, name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    (folder / "config.json").write_text(json.dumps(to_hf_config(NEMOTRON, model)))


if __name__ == "__main__":
    main()
