"""`megatron-cpt average`: one checkpoint from the weighted weights of several."""

from __future__ import annotations

import enum
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from megatron_cpt.cli.commands.checkpoints.convert_command import (
    DTypeOption,
    Json,
    ModelOption,
    PipelineSize,
    ShardSize,
    TensorSize,
    Verify,
    Workers,
    parse_size,
)
from megatron_cpt.cli.missing_package import require_module
from megatron_cpt.cli.progress import progress_bar
from megatron_cpt.errors import UserError

if TYPE_CHECKING:
    from megatron_cpt.transform.average.average_checkpoints import AverageReport

CKPT_HELP = (
    "Checkpoints of one model: ours, run directories (their newest), Megatron checkpoints, Hugging Face folders."
)
WEIGHTS_HELP = "One weight per checkpoint, in their order; they sum to 1. [default: equal weights]"
DECAY_HELP = "Weights that emulate a learning-rate decay over the checkpoints (WSM, arXiv 2507.17634), oldest first."
EVALUATE_HELP = "Evaluate the result on these tasks afterwards, as `megatron-cpt evaluate` does."


class Decay(enum.StrEnum):
    """Shape of a learning-rate decay."""

    LINEAR = "linear"
    COSINE = "cosine"
    MINUS_SQRT = "minus-sqrt"


def average(
    output: Annotated[
        Path, typer.Option("--output", metavar="CKPT", help="The checkpoint to create.", show_default=False)
    ],
    checkpoints: Annotated[
        list[Path] | None, typer.Argument(metavar="CKPT ...", help=CKPT_HELP, show_default=False)
    ] = None,
    run: Annotated[
        Path | None, typer.Option("--run", metavar="RUN_DIR", help="Average checkpoints of this run.")
    ] = None,
    last: Annotated[
        int | None, typer.Option("--last", metavar="N", min=2, help="Number of checkpoints, the newest ones of --run.")
    ] = None,
    weights: Annotated[list[float] | None, typer.Option("--weights", metavar="W ...", help=WEIGHTS_HELP)] = None,
    decay: Annotated[Decay | None, typer.Option("--decay", help=DECAY_HELP)] = None,
    dtype: DTypeOption = None,
    tensor: TensorSize = 1,
    pipeline: PipelineSize = 1,
    shard_size: ShardSize = "256MB",
    workers: Workers = 0,
    model: ModelOption = None,
    verify: Annotated[
        Verify, typer.Option("--verify", help="Share of the checkpoints' checksums to compare.")
    ] = Verify.FULL,
    evaluate: Annotated[list[str] | None, typer.Option("--evaluate", metavar="TASK ...", help=EVALUATE_HELP)] = None,
    limit: Annotated[
        int | None, typer.Option("--limit", metavar="N", min=1, help="Documents per task of --evaluate. [default: all]")
    ] = None,
    as_json: Json = False,
) -> None:
    """Average the weights of checkpoints of one model, in any layout and format.

    The sum of weight x tensor is computed in fp32, in the order of the checkpoints, and rounded once. Optimizer states
    are not averaged. Run the same command again to resume an interrupted average.
    """
    from megatron_cpt.launch.environment import set_cuda_variables

    set_cuda_variables()  # before torch is imported, which reads them; --evaluate computes with it
    from megatron_cpt.convert.megatron.torch_dist_plan import Target
    from megatron_cpt.transform.average.average_checkpoints import AverageOptions, average_checkpoints
    from megatron_cpt.transform.average.average_inputs import last_checkpoints

    if weights and decay:
        raise UserError("--weights, --decay: both give the weights; omit one")
    if limit is not None and not evaluate:
        raise UserError("--limit: of no use without --evaluate; omit it")
    if (run is None) != (last is None) or (run is not None and checkpoints):
        raise UserError("name checkpoints, or a run with --run RUN_DIR --last N")
    if evaluate:
        require_module("lm_eval")
    options = AverageOptions(
        weights=tuple(weights) if weights else None,
        decay=decay.value if decay else None,
        dtype=dtype.value if dtype else None,
        target=Target(tensor, pipeline, parse_size(shard_size)),
        workers=workers,
        model=model,
        verify=verify.value,
    )
    paths = last_checkpoints(run, last) if run is not None and last is not None else checkpoints or []
    with progress_bar("averaging", is_bytes=True) as advance:
        report = average_checkpoints(paths, output, options, advance=advance)
    if as_json:
        print(json.dumps(report.to_dict(), indent=2))
    else:
        _print_report(output, report)
    if evaluate:
        from megatron_cpt.cli.commands.checkpoints.evaluate_command import evaluate as evaluate_model

        evaluate_model(output, tasks=evaluate, limit=limit)


def _print_report(output: Path, report: AverageReport) -> None:
    from megatron_cpt.config import format_bytes, format_count, format_number_of

    print(f"weights: {report.weights}")
    for entry in report.inputs:
        origin = f"step {entry['step']:,}" if entry["step"] is not None else entry["kind"]
        print(f"  {entry['weight']:<10.6g} {entry['path']} ({origin})")
    for note in report.notes:
        print(f"note: {note}")
    kept = f", {report.num_kept} files kept from an interrupted call" if report.num_kept else ""
    print(
        f"{output}: {report.num_tensors} tensors, {format_count(report.num_parameters)} parameters with padding, "
        f"{format_bytes(report.num_bytes)} in {format_number_of(report.num_files, 'file')}{kept}; "
        f"{format_bytes(report.input_bytes)} averaged in {report.seconds:.1f} s "
        f"({format_bytes(report.input_bytes / report.seconds)}/s)"
    )
