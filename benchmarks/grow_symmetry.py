"""Do the copies of a grown model part in training? Rank of the attention output projection, with and without noise.

    python benchmarks/grow_symmetry.py                    # 1 core, about a minute

A random tiny model is trained for 50 steps, grown to twice its width with and without noise, and trained for 50 steps
more on the same text. A projection (2d x 2d) whose four blocks are copies has at most the rank of one block.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import tempfile
from pathlib import Path

import torch
import yaml

from megatron_cpt.cli import main as run_command
from megatron_cpt.convert.exporter import open_checkpoint
from tests.helpers.runs import read_metrics, small_run

NAME = "decoder.layers.1.self_attention.linear_proj.weight"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=50, help="steps before and after the growth")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        measure(Path(folder), options.steps)


def measure(folder: Path, steps: int) -> None:
    """Print a row per noise."""
    run = small_run(
        folder,
        model={"preset": "tiny_llama", "hidden": 64, "heads": 4, "kv_groups": 2, "ffn_hidden": 172},
        tokens=steps * 8 * 32,
        schedule={"shape": "constant", "max_lr": 1e-3, "min_lr": 1e-3},
        phases=[{"name": "all", "blend": {"web": 0.6, "code": 0.4}}],
        log={"every": 1},
    )
    _call("train", run, f"output={folder / 'small'}")
    continued = folder / "continue.yaml"  # with the model of the checkpoint that it starts from
    settings = yaml.safe_load(run.read_text())
    del settings["model"]
    continued.write_text(yaml.safe_dump(settings))
    (folder / "wide.yaml").write_text(yaml.safe_dump({"hidden": 128, "heads": 8, "ffn_hidden": 344}))
    print(f"| noise | steps | blocks of the projection differ by | rank of {2 * 64} | loss |")
    print("| --- | --- | --- | --- | --- |")
    for noise in (0.0, 0.316):
        grown, output = folder / f"grown-{noise}", folder / f"run-{noise}"
        _call("grow", folder / "small", "--to", folder / "wide.yaml", "--output", grown, "--noise", noise)
        _call("train", continued, f"output={output}", f"init={{from: {grown}}}")
        losses = [line["loss"] for line in read_metrics(output)]
        for step, checkpoint, loss in ((0, grown, losses[0]), (steps, output, losses[-1])):
            difference, rank = compare_blocks(checkpoint)
            print(f"| {noise:g} | {step} | {difference:.1e} | {rank} | {loss:.3f} |")


def compare_blocks(checkpoint: Path) -> tuple[float, int]:
    """Return the largest difference of the four blocks, relative to the largest weight, and the rank."""
    opened = open_checkpoint(checkpoint)
    weight = opened.read(NAME, 0, opened.specs[NAME].shape[0]).double()
    half = len(weight) // 2
    blocks = [
        weight[rows, columns]
        for rows in (slice(half), slice(half, None))
        for columns in (slice(half), slice(half, None))
    ]
    difference = max(float((block - blocks[0]).abs().max()) for block in blocks) / float(weight.abs().max())
    return difference, int(torch.linalg.matrix_rank(weight, rtol=1e-6))


def _call(*arguments: object) -> None:
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        status = run_command([str(argument) for argument in arguments])
    assert status == 0, arguments


if __name__ == "__main__":
    main()
