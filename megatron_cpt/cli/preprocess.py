"""`megatron-cpt preprocess`: text in, a .bin/.idx pair out."""

from __future__ import annotations

from typing import Annotated

import typer

INPUT_HELP = "JSON Lines, plain or compressed (.gz, .zst), one or more."
TOKENIZER_HELP = "sentencepiece:tokenizer.model, huggingface:DIR_OR_tokenizer.json or byte."


def preprocess(
    inputs: Annotated[list[str], typer.Option("--input", metavar="F ...", help=INPUT_HELP, show_default=False)],
    output_prefix: Annotated[str, typer.Option("--output-prefix", metavar="P", help="Writes P.bin and P.idx.")],
    tokenizer: Annotated[str, typer.Option("--tokenizer", metavar="KIND:PATH", help=TOKENIZER_HELP)],
    key: Annotated[str, typer.Option("--key", help="The field that holds the text.")] = "text",
    append_eod: Annotated[
        bool, typer.Option("--append-eod", help="End each document with the tokenizer's id.")
    ] = False,
    workers: Annotated[int, typer.Option("--workers", metavar="N", min=1, help="Processes that encode.")] = 1,
) -> None:
    """Encode text for training."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    from megatron_cpt.config import format_count
    from megatron_cpt.data.preprocess import preprocess as encode

    # On stderr, and only where someone looks: stdout and log files stay clean.
    console = Console(stderr=True, markup=False, highlight=False)
    columns = (
        BarColumn(),
        TextColumn("{task.percentage:.0f}% {task.fields[found]}", markup=False),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("encoding", total=None, found="")

        def show(bytes_done: int, bytes_total: int, documents: int, tokens: int) -> None:
            found = f"{format_count(documents)} documents, {format_count(tokens)} tokens"
            bar.update(task, completed=bytes_done, total=bytes_total, found=found)

        report = encode(
            inputs, output_prefix, tokenizer, key=key, append_eod=append_eod, workers=workers, progress=show
        )
    speed = report.text_bytes / 1e6 / max(report.seconds, 1e-9)
    print(
        f"{report.output_prefix}: {report.documents:,} documents, {report.tokens:,} {report.dtype} tokens "
        f"in {report.seconds:.1f} s ({speed:.1f} MB of text a second)"
    )
    if report.empty_documents:
        print(f"left out: {report.empty_documents:,} empty documents")
    if report.bad_lines:
        print(f"left out: {report.bad_lines:,} bad lines, listed in {report.bad_path}")
