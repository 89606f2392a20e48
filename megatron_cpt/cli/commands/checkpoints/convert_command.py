"""`megatron-cpt convert`: import checkpoints of other projects, export them again, and verify the result."""

from __future__ import annotations

import enum
import json
import logging
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from megatron_cpt.cli.commands.checkpoints.generate_command import Weights, WeightsOption
from megatron_cpt.cli.progress import progress_bar
from megatron_cpt.errors import EXIT_REFUSED, UserError
from megatron_cpt.files.retry import is_path_error
from megatron_cpt.files.whole_io import read_text

if TYPE_CHECKING:
    from megatron_cpt.convert.exporter import ExportReport
    from megatron_cpt.convert.importer import ImportReport
    from megatron_cpt.convert.logits import LogitsReport
    from megatron_cpt.convert.verify import TensorReport

logger = logging.getLogger(__name__)

app = typer.Typer(
    name="convert",
    help="Import checkpoints of other projects, export them again, and verify that nothing was lost.",
    no_args_is_help=True,
    rich_markup_mode=None,
)

SOURCE_HELP = "A Hugging Face folder, or a Megatron checkpoint: torch_dist (also Megatron-Bridge, NeMo 2) or mp_rank_*."
CKPT_HELP = "A checkpoint, a run directory (its newest checkpoint), or a Megatron checkpoint."
MODEL_HELP = "Model of a Megatron checkpoint that stores no config: a preset, or a YAML file with a model section."
LOGITS_LIMIT = 1e-4
_MAX_SHOWN = 20


DType = enum.StrEnum("DType", ["FP32", "BF16", "FP16"])
Format = enum.StrEnum("Format", ["HUGGINGFACE", "MEGATRON"])


class Verify(enum.StrEnum):
    """Share of a checkpoint's checksums to compare."""

    FULL = "full"
    SAMPLED = "sampled"
    NONE = "none"


Checkpoint = Annotated[Path, typer.Argument(metavar="CKPT_DIR", help=CKPT_HELP, show_default=False)]
Workers = Annotated[int, typer.Option("--workers", metavar="N", min=0, help="Number of threads; 0: one per core.")]
DTypeOption = Annotated[DType | None, typer.Option("--dtype", help="Dtype of the weights. [default: unchanged]")]
TensorSize = Annotated[int, typer.Option("--tensor", min=1, help="Tensor-parallel size that loads fastest.")]
PipelineSize = Annotated[int, typer.Option("--pipeline", min=1, help="Pipeline-parallel size that loads fastest.")]
ShardSize = Annotated[str, typer.Option("--shard-size", metavar="BYTES", help="Size of a file: 5GB, 500MB.")]
ModelOption = Annotated[str | None, typer.Option("--model", metavar="NAME|FILE", help=MODEL_HELP)]
AllowPickle = Annotated[bool, typer.Option("--allow-pickle", help="Also read pickled .bin weights, tensors only.")]
Json = Annotated[bool, typer.Option("--json", help="Print the report as JSON.")]


@app.command("import")
def import_(
    source: Annotated[Path, typer.Argument(metavar="HF_OR_MEGATRON_DIR", help=SOURCE_HELP, show_default=False)],
    target: Annotated[Path, typer.Argument(metavar="CKPT_DIR", help="The checkpoint to create.", show_default=False)],
    dtype: DTypeOption = None,
    tensor: TensorSize = 1,
    pipeline: PipelineSize = 1,
    shard_size: ShardSize = "256MB",
    workers: Workers = 0,
    model: ModelOption = None,
    optimizer: Annotated[
        bool,
        typer.Option("--optimizer", help="Also import Adam's moments, master weights and step, from torch_dist."),
    ] = False,
    add_tokens: Annotated[
        Path | None, typer.Option("--add-tokens", metavar="FILE", help="Tokens to add to the vocabulary, one per line.")
    ] = None,
    init_rows: Annotated[
        str,
        typer.Option(
            "--init-rows",
            metavar="pieces|mean",
            help="Embeddings of new tokens: mean over the old tokenizer's pieces of the token, or over all tokens.",
        ),
    ] = "pieces",
    loss_on: Annotated[
        str | None,
        typer.Option(
            "--loss-on",
            metavar="FILE|PREFIX",
            help="With --add-tokens, compute the loss on held-out text under both tokenizers: JSONL, or a dataset.",
        ),
    ] = None,
    allow_pickle: AllowPickle = False,
    allow_nan: Annotated[bool, typer.Option("--allow-nan", help="Import weights that are NaN or infinite.")] = False,
    as_json: Json = False,
) -> None:
    """Import weights as a checkpoint for `init.from`, which every parallel layout can load.

    Run the same command again to resume an interrupted import.
    """
    from megatron_cpt.config import format_number_of
    from megatron_cpt.convert.importer import ImportOptions, import_checkpoint
    from megatron_cpt.convert.megatron.torch_dist_plan import Target

    if init_rows not in ("pieces", "mean"):
        raise UserError(f"--init-rows {init_rows}: choose pieces or mean")
    options = ImportOptions(
        dtype=dtype.value if dtype else None,
        target=Target(tensor, pipeline, parse_size(shard_size)),
        workers=workers,
        model=model,
        allow_pickle=allow_pickle,
        allow_nan=allow_nan,
        optimizer=optimizer,
        new_tokens=_read_tokens(add_tokens) if add_tokens else (),
        init_rows=init_rows,
        loss_on=loss_on,
    )
    with progress_bar("importing", is_bytes=True) as advance:
        report = import_checkpoint(source, target, options, advance=advance)
    if as_json:
        _print_json(report.to_dict())
        return
    print(
        f"{target}: {report.num_tensors} tensors, {report.num_parameters / 1e6:,.1f}M parameters with padding, "
        f"{_size_and_speed(report)} in {format_number_of(report.num_files, 'file')}{_kept(report, 'files')}"
    )
    if report.optimizer_step is not None:
        print(f"optimizer: moments and master weights after {report.optimizer_step:,} updates")
    if report.vocabulary is not None:
        print(f"vocabulary: {report.vocabulary}")
    if report.loss is not None:
        print(f"loss: {report.loss}")
    if report.ids_without_row:
        print(
            f"warning: the tokenizer has {report.ids_without_row:,} ids more than the model has rows, and `train` "
            "refuses that; to give them rows, import again with --add-tokens FILE, which lists these tokens"
        )


@app.command("export")
def export(
    source: Checkpoint,
    target: Annotated[Path, typer.Argument(metavar="OUT_DIR", help="The folder to create.", show_default=False)],
    to: Annotated[
        Format,
        typer.Option("--format", help="huggingface: weights; megatron: a folder that Megatron-LM resumes from."),
    ] = Format.HUGGINGFACE,
    dtype: DTypeOption = None,
    shard_size: ShardSize = "5GB",
    workers: Workers = 0,
    model: ModelOption = None,
    family: Annotated[
        str | None,
        typer.Option("--family", metavar="NAME", help="Family to export as. [default: as imported, or the first fit]"),
    ] = None,
    files: Annotated[
        Path | None,
        typer.Option("--files", metavar="DIR", help="Config and tokenizer files. [default: the import's files]"),
    ] = None,
    verify: Annotated[
        Verify, typer.Option("--verify", help="Share of the checkpoint's checksums to compare.")
    ] = Verify.FULL,
    weights: WeightsOption = Weights.RAW,
    as_json: Json = False,
) -> None:
    """Export a checkpoint as a Hugging Face folder, with the config and tokenizer files that were imported with it.

    Run the same command again to resume an interrupted export.
    """
    if to is Format.MEGATRON:
        given = {"--dtype": dtype, "--family": family, "--files": files, "--model": model}
        given["--weights"] = weights if weights is not Weights.RAW else None
        if unused := [option for option, value in given.items() if value is not None]:
            raise UserError(f"{', '.join(unused)}: of no use with --format megatron, which copies tensors; omit it")
        _export_for_megatron_lm(source, target, workers, verify, as_json)
        return
    from megatron_cpt.convert.exporter import ExportOptions, export_checkpoint

    options = ExportOptions(
        dtype=dtype.value if dtype else None,
        shard_bytes=parse_size(shard_size),
        workers=workers,
        family=family,
        files=files,
        model=model,
        verify=verify.value,
        weights=weights.value,
    )
    with progress_bar("exporting", is_bytes=True) as advance:
        report = export_checkpoint(source, target, options, advance=advance)
    if as_json:
        _print_json(report.to_dict())
        return
    print(
        f"{target}: {report.family}, {report.num_tensors} tensors, {_size_and_speed(report)}"
        f"{_kept(report, 'tensors')}; with {', '.join(report.side_files)}"
    )


def _export_for_megatron_lm(source: Path, target: Path, workers: int, verify: Verify, as_json: bool) -> None:
    from megatron_cpt.convert.megatron.megatron_lm_export import describe, export_megatron_lm

    with progress_bar("copying", is_bytes=True) as advance:
        report = export_megatron_lm(source, target, workers=workers, verify=verify.value, advance=advance)
    if as_json:
        _print_json(report.to_dict())
    else:
        print(f"{target}: iteration {report.iteration}, {report.num_bytes / 1e9:.2f} GB")
        print(describe(report))


@app.command("verify")
def verify(
    hf: Annotated[Path, typer.Argument(metavar="HF_DIR", help="A Hugging Face folder.", show_default=False)],
    checkpoint: Checkpoint,
    logits: Annotated[
        bool,
        typer.Option("--logits", help="Also compare logits with transformers in fp32; run under torchrun for TP x PP."),
    ] = False,
    prompts: Annotated[
        Path | None,
        typer.Option(
            "--prompts", metavar="FILE", help="Prompts for --logits, one per line. [default: 4 built-in ones]"
        ),
    ] = None,
    tensor: Annotated[int, typer.Option("--tensor", min=1, help="Tensor-parallel size for --logits.")] = 1,
    pipeline: Annotated[int, typer.Option("--pipeline", min=1, help="Pipeline-parallel size for --logits.")] = 1,
    workers: Workers = 0,
    model: ModelOption = None,
    weights: WeightsOption = Weights.RAW,
    allow_pickle: AllowPickle = False,
    as_json: Json = False,
) -> None:
    """Verify that a checkpoint is the model of a Hugging Face folder: every tensor accounted for, every byte equal.

    Exit status 3 if they differ. Logits agree if no logit and no prompt's mean loss differs by more than 1e-4.
    """
    from megatron_cpt.config.launcher import read_launcher
    from megatron_cpt.convert.verify import verify_tensors

    tensors = compared = None
    if read_launcher().rank == 0:
        with progress_bar("comparing", is_bytes=True) as advance:
            tensors = verify_tensors(
                hf,
                checkpoint,
                workers=workers,
                allow_pickle=allow_pickle,
                model=model,
                weights=weights.value,
                advance=advance,
            )
    if logits:
        from megatron_cpt.convert.logits import compare_logits

        texts = _read_lines("--prompts", prompts, "prompt", str.strip) if prompts else None
        compared = compare_logits(hf, checkpoint, texts, tensor=tensor, pipeline=pipeline, weights=weights.value)
    if tensors is None:
        return
    if as_json:
        _print_json({"tensors": tensors.to_dict(), "logits": compared.to_dict() if compared else None})
    else:
        _print_verification(checkpoint, tensors, compared)
    # False for NaN
    do_logits_agree = compared is None or max(compared.max_difference, compared.max_loss_difference) <= LOGITS_LIMIT
    if not (tensors.is_equal and do_logits_agree):
        raise typer.Exit(EXIT_REFUSED)


def _print_json(report: Mapping[str, Any]) -> None:
    print(json.dumps(report, indent=2))


def _size_and_speed(report: ImportReport | ExportReport) -> str:
    from megatron_cpt.config import format_bytes

    return f"{format_bytes(report.num_bytes)} ({format_bytes(report.num_bytes / report.seconds)}/s)"


def _kept(report: ImportReport | ExportReport, parts: str) -> str:
    return f", {report.num_kept} {parts} kept from an interrupted call" if report.num_kept else ""


def _print_verification(checkpoint: Path, tensors: TensorReport, logits: LogitsReport | None) -> None:
    from megatron_cpt.config import format_bytes

    cast = f", {tensors.num_cast} of another dtype compared in the narrower one" if tensors.num_cast else ""
    verdict = "identical bit for bit" if tensors.is_equal else f"{len(tensors.differing)} DIFFER"
    size = format_bytes(tensors.num_bytes)
    print(f"{checkpoint}: {tensors.family}, {tensors.num_tensors} tensors{cast}, {size}: {verdict}")
    for name, count in list(tensors.differing.items())[:_MAX_SHOWN]:
        print(f"  {name}: {count:,} elements differ")
    for name, rows in tensors.padding.items():
        print(f"  note: {name}: {rows} rows of padding are not zero")
    if tensors.note:
        print(f"  note: {tensors.note}")
    if logits is not None:
        print(
            f"logits at {logits.layout}, {logits.num_prompts} prompts, {logits.num_tokens} tokens "
            f"({logits.tokens}): largest difference {logits.max_difference:.2e}, of a prompt's loss "
            f"{logits.max_loss_difference:.2e}, KL {logits.mean_kl:.2e}, "
            f"same first token at {logits.top1_agreement:.2%} of positions"
        )


def _read_tokens(file: Path) -> tuple[str, ...]:
    lines = _read_lines("--add-tokens", file, "token")
    tokens = tuple(dict.fromkeys(lines))
    if len(tokens) < len(lines):
        logger.warning("--add-tokens %s: %d lines repeat earlier ones, and are skipped", file, len(lines) - len(tokens))
    return tokens


def _read_lines(option: str, file: Path, unit: str, keep: Callable[[str], str] = str) -> list[str]:
    try:
        # not `splitlines`, which also cuts at characters such as U+2028 inside a line
        lines = [line for line in read_text(file, "utf-8-sig").replace("\r\n", "\n").split("\n") if keep(line)]
    except (OSError, UnicodeDecodeError) as error:
        if isinstance(error, OSError) and not is_path_error(error):
            raise
        raise UserError(f"{option} {file}: cannot be read ({error})") from error
    if not lines:
        raise UserError(f"{option} {file}: empty; write one {unit} per line")
    return lines


def parse_size(text: str) -> int:
    """Return the number of bytes for `1GB`, `500MB` or a plain number."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kKmMgGtT]?)[bB]?", text.strip())
    size = int(float(match[1]) * 1000 ** " KMGT".index(match[2].upper() or " ")) if match else 0
    if size < 1:
        raise UserError(f"--shard-size {text}: not a size; write 5GB, 500MB or a number of bytes")
    return size
