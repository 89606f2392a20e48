"""`megatron-cpt grow`: a larger model that computes the same function as a trained one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from megatron_cpt.cli.commands.checkpoints.convert_command import DType, Json, PipelineSize, TensorSize
from megatron_cpt.cli.progress import progress_bar
from megatron_cpt.errors import UserError

if TYPE_CHECKING:
    from megatron_cpt.transform.grow.grow_checkpoint import GrowReport

_MODEL_HELP = "Shape to grow to: a YAML file with keys of run.yaml's `model` section. Omitted keys stay unchanged."
_NOISE_HELP = "Noise that parts the copies, relative to the weights, without changing the function; 0: none."
_TOLERANCE_HELP = "Largest relative difference of the logits. [default: 1e-5 in fp32, 0.02 in fp16, 0.1 in bf16]"


def grow(
    checkpoint: Annotated[
        Path, typer.Argument(metavar="CKPT", help="A checkpoint, or a run directory.", show_default=False)
    ],
    to: Annotated[Path, typer.Option("--to", metavar="MODEL.yaml", help=_MODEL_HELP, show_default=False)],
    output: Annotated[
        Path, typer.Option("--output", metavar="CKPT", help="The checkpoint to create.", show_default=False)
    ],
    noise: Annotated[float, typer.Option("--noise", metavar="RATIO", min=0, help=_NOISE_HELP)] = 0.316,
    seed: Annotated[
        int,
        typer.Option("--seed", metavar="N", min=0, max=2**62 - 1, help="Seed of the noise and of fresh weights."),
    ] = 1234,
    dtype: Annotated[
        DType | None, typer.Option("--dtype", help="Dtype of the weights; fp32 is exact. [default: unchanged]")
    ] = None,
    tensor: TensorSize = 1,
    pipeline: PipelineSize = 1,
    workers: Annotated[
        int, typer.Option("--workers", metavar="N", min=0, help="Number of threads; 0: one per core, at most 4.")
    ] = 0,
    proof: Annotated[
        bool, typer.Option("--proof/--no-proof", help="Compare the logits of both models, in memory, in fp32.")
    ] = True,
    tolerance: Annotated[
        float | None, typer.Option("--tolerance", metavar="X", min=0, help=_TOLERANCE_HELP, show_default=False)
    ] = None,
    as_json: Json = False,
) -> None:
    """Grow a checkpoint in width and depth to a larger model that computes the same function.

    Run the same command again to resume an interrupted growth.
    """
    from megatron_cpt.convert.megatron.torch_dist_plan import Target
    from megatron_cpt.transform.grow.grow_checkpoint import GrowOptions, grow_checkpoint

    if not noise < float("inf"):
        raise UserError(f"--noise {noise}: not a finite number; 0.316 is the default")
    options = GrowOptions(
        noise=noise,
        seed=seed,
        dtype=dtype.value if dtype else None,
        target=Target(tensor, pipeline),
        workers=workers,
        should_prove=proof,
        tolerance=tolerance,
    )
    with progress_bar("growing", is_bytes=True) as advance:
        report = grow_checkpoint(checkpoint, to, output, options, advance=advance)
    if as_json:
        print(json.dumps(report.to_dict(), indent=2))
        return
    _print_report(output, report)


def _print_report(output: Path, report: GrowReport) -> None:
    from megatron_cpt.config import format_bytes, format_number_of

    grown = [f"{key} {old} -> {new}" for key, (old, new) in report.sizes.items() if new != old]
    print(f"{output}: {', '.join(grown)}")
    size = f"{format_bytes(report.num_bytes)} in {format_number_of(report.num_files, 'file')}"
    kept = f", {report.num_kept} kept from an earlier call" if report.num_kept else ""
    print(
        f"{report.num_parameters / 1e6:,.1f}M parameters with padding in {report.num_tensors} tensors, {size}{kept}, "
        f"{report.seconds:.1f} s"
    )
    if report.identity_layers:
        copies = ", ".join(f"{number} (of {layer})" for number, layer in report.identity_layers.items())
        print(f"identity layers, copies of old ones that add nothing yet: {copies}")
    if report.proof is None:
        print("no proof: the logits of both models were not compared (--no-proof)")
        return
    print(
        f"proof: logits of both models on {report.proof.num_tokens} random tokens in fp32: largest difference "
        f"{report.proof.relative_difference:.2e} of the largest logit (limit {report.proof.limit:g}), same first token "
        f"at {report.proof.top1_agreement:.2%} of positions"
    )
