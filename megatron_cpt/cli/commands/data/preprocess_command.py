"""`megatron-cpt preprocess`: encode text files to `.bin`/`.idx` pairs."""

from __future__ import annotations

import enum
from typing import Annotated

import typer

INPUT_HELP = (
    "JSON Lines, CSV, text (also .gz, .zst, .bz2, .xz), .parquet and .arrow: one or more files, globs or folders; - is "
    "standard input."
)
EOD_HELP = "The token or id that ends each document, in place of the tokenizer's; implies --append-eod."
BOS_HELP = "Begin each document with the tokenizer's beginning-of-sequence id."
MAX_BAD_HELP = "Fail if more lines, or with % more lines or bytes, are bad. [default: 0.1%, but at least 10 lines]"
DAMAGED_HELP = "Keep what can be read of truncated or corrupt files; otherwise they are refused."
TOKENIZER_HELP = "sentencepiece:tokenizer.model, huggingface:DIR_OR_tokenizer.json or byte."
KEY_HELP = "The field that holds the text; a.b is a field of a field. Several keys: one dataset per key, P_KEY."
SHARD_HELP = "Encode part i of n (i from 0); `slurm`: the part of this task or array job. Afterwards: --join n."
JOIN_HELP = "Join the N shards of P into one dataset; needs neither --input nor --tokenizer."
FAST_HELP = "Use gigatoken instead of the tokenizer's library: auto (if installed and certified), on, off."
ENGINE_HELP = (
    "Machines that do the work: local (processes of this machine) or ray (a Ray cluster); both write equal bytes."
)
RAY_HELP = "With --engine ray: a running cluster, such as head:6379. [default: one is started on this machine]"
CHECK_HELP = "Compare gigatoken's ids with the library's: sample (one text per block) or all."


class Fast(enum.StrEnum):
    """Values of --fast-tokenizer."""

    AUTO = "auto"
    ON = "on"
    OFF = "off"


class WorkEngine(enum.StrEnum):
    """Values of --engine."""

    LOCAL = "local"
    RAY = "ray"


class Check(enum.StrEnum):
    """Values of --tokenizer-check."""

    SAMPLE = "sample"
    ALL = "all"


def preprocess(
    output_prefix: Annotated[str, typer.Option("--output-prefix", metavar="P", help="Writes P.bin and P.idx.")],
    inputs: Annotated[list[str] | None, typer.Option("--input", metavar="F ...", help=INPUT_HELP)] = None,
    tokenizer: Annotated[str, typer.Option("--tokenizer", metavar="KIND:PATH", help=TOKENIZER_HELP)] = "",
    key: Annotated[list[str] | None, typer.Option("--key", metavar="K ...", help=f"{KEY_HELP} [default: text]")] = None,
    append_eod: Annotated[
        bool, typer.Option("--append-eod", help="End each document with the end-of-document id.")
    ] = False,
    eod: Annotated[str | None, typer.Option("--eod", metavar="TOKEN_OR_ID", help=EOD_HELP)] = None,
    prepend_bos: Annotated[bool, typer.Option("--prepend-bos", help=BOS_HELP)] = False,
    workers: Annotated[
        int | None, typer.Option("--workers", metavar="N", min=1, help="Worker processes. [default: all cores]")
    ] = None,
    shuffle: Annotated[
        int | None, typer.Option("--shuffle", metavar="SEED", min=0, help="Shuffle the documents.")
    ] = None,
    split_tokens: Annotated[
        str | None,
        typer.Option("--split-tokens", metavar="T", help="Pairs of at most T tokens: P-00000, P-00001 and so on."),
    ] = None,
    max_bad: Annotated[str | None, typer.Option("--max-bad", metavar="N|X%", help=MAX_BAD_HELP)] = None,
    allow_damaged_input: Annotated[bool, typer.Option("--allow-damaged-input", help=DAMAGED_HELP)] = False,
    max_line: Annotated[
        str, typer.Option("--max-line", metavar="BYTES", help="Longer lines count as bad (64M: 64 million).")
    ] = "64M",
    shard: Annotated[str | None, typer.Option("--shard", metavar="i/n", help=SHARD_HELP)] = None,
    join: Annotated[int | None, typer.Option("--join", metavar="N", min=1, help=JOIN_HELP)] = None,
    fast_tokenizer: Annotated[Fast, typer.Option("--fast-tokenizer", help=FAST_HELP)] = Fast.AUTO,
    tokenizer_check: Annotated[Check, typer.Option("--tokenizer-check", help=CHECK_HELP)] = Check.SAMPLE,
    engine: Annotated[WorkEngine, typer.Option("--engine", help=ENGINE_HELP)] = WorkEngine.LOCAL,
    ray_address: Annotated[str | None, typer.Option("--ray-address", metavar="ADDR", help=RAY_HELP)] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing dataset.")] = False,
    restart: Annotated[bool, typer.Option("--restart", help="Discard earlier progress, start from scratch.")] = False,
) -> None:
    """Encode text for training.

    Run the same command again to resume an interrupted run.
    """
    from megatron_cpt.cli.encoding_progress import encoding_progress, print_report

    if join is not None:
        if inputs or tokenizer or shard:
            raise typer.BadParameter("do not combine it with --input, --tokenizer or --shard", param_hint="--join")
        from megatron_cpt.data.preprocess.join import join_shards

        print_report(join_shards(output_prefix, join, max_bad=max_bad, overwrite=overwrite))
        return
    for option, value in (("--input", inputs), ("--tokenizer", tokenizer)):
        if not value:
            raise typer.BadParameter("Missing option", param_hint=option)
    import os

    from megatron_cpt.cli.missing_package import require_module
    from megatron_cpt.data.preprocess.inputs import parse_shard
    from megatron_cpt.data.preprocess.pipeline import PreprocessOptions
    from megatron_cpt.data.preprocess.pipeline import preprocess as encode

    if engine is WorkEngine.RAY:
        require_module("ray")
    part = None if shard is None else parse_shard(shard, os.environ)
    with encoding_progress() as (show, notify):
        options = PreprocessOptions(
            key=key or "text",
            append_eod=append_eod,
            eod=eod,
            prepend_bos=prepend_bos,
            workers=workers,
            shuffle=shuffle,
            split_tokens=None if split_tokens is None else _count("--split-tokens", split_tokens),
            shard=part,
            max_bad=max_bad,
            allow_damaged_input=allow_damaged_input,
            max_line_bytes=_count("--max-line", max_line),
            fast_tokenizer=fast_tokenizer.value,
            tokenizer_check=tokenizer_check.value,
            engine=engine.value,
            ray_address=ray_address,
            overwrite=overwrite,
            restart=restart,
            progress=show,
            notify=notify,
        )
        report = encode(inputs or [], output_prefix, tokenizer=tokenizer, options=options)
    print_report(report)
    if part is not None:
        print(f"shard {part.index} of {part.count} is ready; when all shards are ready, run --join {part.count}")


def _count(option: str, text: str) -> int:
    from megatron_cpt.config.quantities import parse_count

    try:
        count = parse_count(text)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint=option) from error
    if count < 1:
        raise typer.BadParameter("must be at least 1", param_hint=option)
    return count
