"""`megatron-cpt convert`: checkpoints of other projects in and out, and the proof that nothing was lost."""

from __future__ import annotations

import enum
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from megatron_cpt.errors import EXIT_REFUSED, UserError

if TYPE_CHECKING:
    from megatron_cpt.convert.exporter import ExportReport
    from megatron_cpt.convert.importer import ImportReport
    from megatron_cpt.convert.logits import LogitsReport
    from megatron_cpt.convert.verify import TensorReport

app = typer.Typer(
    name="convert",
    help="Checkpoints of other projects in and out, a tensor at a time, and the proof that nothing was lost.",
    no_args_is_help=True,
    rich_markup_mode=None,
)

SOURCE_HELP = (
    "A Hugging Face folder, or a checkpoint of Megatron: torch_dist (also Megatron-Bridge, NeMo 2) or mp_rank_*."
)
CKPT_HELP = "A checkpoint, a run directory (its newest), or a checkpoint of Megatron."
MODEL_HELP = "What a checkpoint of Megatron is, where it does not say: a preset, or a YAML file with the model section."
LOGITS_LIMIT = 1e-4


class DType(enum.StrEnum):
    """Types of weights."""

    FP32 = "fp32"
    BF16 = "bf16"
    FP16 = "fp16"


class Verify(enum.StrEnum):
    """How much of a checkpoint's checksums is compared."""

    FULL = "full"
    SAMPLED = "sampled"
    NONE = "none"


Checkpoint = Annotated[Path, typer.Argument(metavar="CKPT_DIR", help=CKPT_HELP, show_default=False)]
Workers = Annotated[int, typer.Option("--workers", metavar="N", min=0, help="Threads; 0: all cores.")]
DTypeOption = Annotated[DType | None, typer.Option("--dtype", help="Type of the weights. [default: as they are]")]
ShardSize = Annotated[str, typer.Option("--shard-size", metavar="BYTES", help="Of a file: 5GB, 500MB.")]
ModelOption = Annotated[str | None, typer.Option("--model", metavar="NAME|FILE", help=MODEL_HELP)]
AllowPickle = Annotated[bool, typer.Option("--allow-pickle", help="Also read pickled .bin weights, tensors only.")]
Json = Annotated[bool, typer.Option("--json", help="Print the report as JSON.")]


@app.command("import")
def import_(
    source: Annotated[Path, typer.Argument(metavar="HF_OR_MEGATRON_DIR", help=SOURCE_HELP, show_default=False)],
    target: Annotated[Path, typer.Argument(metavar="CKPT_DIR", help="Is made.", show_default=False)],
    dtype: DTypeOption = None,
    tensor: Annotated[int, typer.Option("--tensor", min=1, help="Cut the pieces for this tensor-parallel size.")] = 1,
    pipeline: Annotated[int, typer.Option("--pipeline", min=1, help="End files where these stages end.")] = 1,
    shard_size: ShardSize = "256MB",
    workers: Workers = 0,
    model: ModelOption = None,
    add_tokens: Annotated[
        Path | None, typer.Option("--add-tokens", metavar="FILE", help="New tokens, one a line; rows are initialized.")
    ] = None,
    init_rows: Annotated[
        str, typer.Option("--init-rows", metavar="pieces|mean", help="Rows of new tokens from these.")
    ] = "pieces",
    allow_pickle: AllowPickle = False,
    allow_nan: Annotated[bool, typer.Option("--allow-nan", help="Take weights that are not finite.")] = False,
    as_json: Json = False,
) -> None:
    """Import weights: a checkpoint that `init.from` takes, for any layout.

    A call that was stopped goes on where it was when the same command is given again.
    """
    from megatron_cpt.convert.importer import ImportOptions, import_checkpoint
    from megatron_cpt.convert.megatron.torch_dist_plan import Target
    from megatron_cpt.convert.vocabulary import read_new_tokens

    if init_rows not in ("pieces", "mean"):
        raise UserError(f"--init-rows {init_rows}: pieces or mean")
    options = ImportOptions(
        dtype=dtype.value if dtype else None,
        target=Target(tensor, pipeline, parse_size("--shard-size", shard_size)),
        workers=workers,
        model=model,
        allow_pickle=allow_pickle,
        allow_nan=allow_nan,
        new_tokens=read_new_tokens(add_tokens) if add_tokens else (),
        init_rows=init_rows,
    )
    with transfer_bar("importing") as advance:
        report = import_checkpoint(source, target, options, advance=advance)
    if as_json:
        _print_json(report.to_dict())
        return
    print(
        f"{target}: {report.num_tensors} tensors, {report.num_parameters / 1e6:,.1f}M parameters with padding, "
        f"{_amount(report)} in {report.num_files} files{_kept(report, 'files')}"
    )
    if report.vocabulary is not None:
        print(f"vocabulary: {report.vocabulary}")


@app.command("export")
def export(
    source: Checkpoint,
    target: Annotated[Path, typer.Argument(metavar="HF_DIR", help="Is made.", show_default=False)],
    dtype: DTypeOption = None,
    shard_size: ShardSize = "5GB",
    workers: Workers = 0,
    model: ModelOption = None,
    family: Annotated[
        str | None, typer.Option("--family", metavar="NAME", help="Where neither checkpoint nor model says it.")
    ] = None,
    files: Annotated[
        Path | None,
        typer.Option("--files", metavar="DIR", help="Config and tokenizer files. [default: those of the import]"),
    ] = None,
    verify: Annotated[
        Verify, typer.Option("--verify", help="How much of the checkpoint's checksums to compare.")
    ] = Verify.FULL,
    as_json: Json = False,
) -> None:
    """Export a checkpoint as a Hugging Face folder, with the config and tokenizer files that came with it.

    A call that was stopped goes on where it was when the same command is given again.
    """
    from megatron_cpt.convert.exporter import ExportOptions, export_checkpoint

    options = ExportOptions(
        dtype=dtype.value if dtype else None,
        shard_bytes=parse_size("--shard-size", shard_size),
        workers=workers,
        family=family,
        files=files,
        model=model,
        verify=verify.value,
    )
    with transfer_bar("exporting") as advance:
        report = export_checkpoint(source, target, options, advance=advance)
    if as_json:
        _print_json(report.to_dict())
        return
    print(
        f"{target}: {report.family}, {report.num_tensors} tensors, {_amount(report)}{_kept(report, 'tensors')}; "
        f"with {', '.join(report.side_files)}"
    )


@app.command("verify")
def verify(
    hf: Annotated[Path, typer.Argument(metavar="HF_DIR", help="A Hugging Face folder.", show_default=False)],
    checkpoint: Checkpoint,
    logits: Annotated[
        bool, typer.Option("--logits", help="Also compare logits with transformers, in fp32; also under torchrun.")
    ] = False,
    prompts: Annotated[
        Path | None, typer.Option("--prompts", metavar="FILE", help="Prompts, one a line. [default: four of our own]")
    ] = None,
    tensor: Annotated[int, typer.Option("--tensor", min=1, help="Tensor-parallel size of --logits.")] = 1,
    pipeline: Annotated[int, typer.Option("--pipeline", min=1, help="Pipeline stages of --logits.")] = 1,
    workers: Workers = 0,
    model: ModelOption = None,
    allow_pickle: AllowPickle = False,
    as_json: Json = False,
) -> None:
    """Prove that a checkpoint is the model of a Hugging Face folder: every tensor accounted for, every byte equal.

    Exit status 3: it is not. Logits agree where no one differs by more than 1e-4.
    """
    from megatron_cpt.convert.verify import verify_tensors

    is_main = int(os.environ.get("RANK", "0")) == 0
    tensors = compared = None
    if is_main:
        with transfer_bar("comparing") as advance:
            tensors = verify_tensors(
                hf, checkpoint, workers=workers, allow_pickle=allow_pickle, model=model, advance=advance
            )
    if logits:
        from megatron_cpt.convert.logits import compare_logits

        texts = _prompts(prompts) if prompts else None
        compared = compare_logits(hf, checkpoint, texts, tensor=tensor, pipeline=pipeline)
    if tensors is None:
        return
    agree = compared is None or compared.max_difference <= LOGITS_LIMIT
    if as_json:
        _print_json({"tensors": tensors.to_dict(), "logits": compared.to_dict() if compared else None})
    else:
        _print(checkpoint, tensors, compared)
    if not (tensors.is_equal and agree):
        raise typer.Exit(EXIT_REFUSED)


def _print_json(report: Mapping[str, Any]) -> None:
    print(json.dumps(report, indent=2))


def _amount(report: ImportReport | ExportReport) -> str:
    gigabytes = report.num_bytes / 1e9
    return f"{gigabytes:.2f} GB ({gigabytes / report.seconds:.2f} GB/s)"


def _kept(report: ImportReport | ExportReport, what: str) -> str:
    return f", {report.num_kept} {what} kept from a call before" if report.num_kept else ""


def _print(checkpoint: Path, tensors: TensorReport, compared: LogitsReport | None) -> None:
    cast = f", {tensors.num_cast} of them of another type, compared as the narrower" if tensors.num_cast else ""
    verdict = "equal to the bit" if tensors.is_equal else f"{len(tensors.differing)} DIFFER"
    size = f"{tensors.num_bytes / 1e9:.2f} GB"
    print(f"{checkpoint}: {tensors.family}, {tensors.num_tensors} tensors{cast}, {size}: {verdict}")
    for name, count in list(tensors.differing.items())[:20]:
        print(f"  {name}: {count:,} elements differ")
    for name, rows in tensors.padding.items():
        print(f"  note: {name}: {rows} rows of padding are not zero")
    if compared is not None:
        print(
            f"logits at {compared.layout}, {compared.num_prompts} prompts, {compared.num_tokens} tokens "
            f"({compared.tokens}): largest difference {compared.max_difference:.2e}, KL {compared.mean_kl:.2e}, "
            f"same first token at {compared.top1_agreement:.2%} of positions"
        )


def _prompts(file: Path) -> list[str]:
    try:
        texts = [line for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--prompts {file}: cannot be read ({error})") from error
    if not texts:
        raise UserError(f"--prompts {file}: empty")
    return texts


def parse_size(option: str, text: str) -> int:
    """Bytes: 1GB, 500MB, or a plain number.

    Raises:
        UserError: it is none.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kKmMgGtT]?)[bB]?", text.strip())
    size = int(float(match[1]) * 1000 ** " KMGT".index(match[2].upper() or " ")) if match else 0
    if size < 1:
        raise UserError(f"{option} {text}: not a size; write 5GB, 500MB or a number of bytes")
    return size


@contextmanager
def transfer_bar(what: str) -> Iterator[Callable[[int, int], None]]:
    """A progress bar in bytes with its speed, on stderr and only where someone looks.

    Yields:
        What counts on: called with bytes done since the last call, and all of them; from any thread.
    """
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    console = Console(stderr=True, markup=False, highlight=False)
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(what, total=None)

        def advance(amount: int, total: int) -> None:
            bar.update(task, advance=amount, total=total)

        yield advance
