"""Command `split`: hold documents out of datasets, or draw a sample."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from megatron_cpt.cli.commands.data.merge_command import MIXED_HELP, total_bytes
from megatron_cpt.cli.progress import progress_bar

FRACTION_HELP = "Share of the documents to hold out, above 0 and below 1."
REST_HELP = "Write the other documents to P.bin and P.idx. [default: do not write them]"


def split(
    inputs: Annotated[
        list[str], typer.Option("--input", metavar="PREFIX ...", help="Datasets: prefixes of .bin/.idx, or globs.")
    ],
    fraction: Annotated[float, typer.Option("--fraction", metavar="F", help=FRACTION_HELP)],
    held_out_prefix: Annotated[
        str, typer.Option("--held-out-prefix", metavar="P", help="Write the held-out documents to P.bin and P.idx.")
    ],
    rest_prefix: Annotated[str | None, typer.Option("--rest-prefix", metavar="P", help=REST_HELP)] = None,
    seed: Annotated[int, typer.Option("--seed", help="A different seed draws different documents.")] = 1234,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace existing files.")] = False,
    allow_mixed_tokenizers: Annotated[bool, typer.Option("--allow-mixed-tokenizers", help=MIXED_HELP)] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Hold documents out, or draw a sample, by a hash of their content.

    The side of a document depends only on its ids and the seed. So copies of a document are on the same side, and it
    stays there when the corpus grows.
    """
    from megatron_cpt.data.rewrite.split import split_datasets
    from megatron_cpt.data.tokenfile.reader import expand_prefixes

    prefixes = expand_prefixes(inputs)
    with progress_bar("splitting", total_bytes(prefixes)) as advance:
        report = split_datasets(
            prefixes,
            held_out_prefix,
            rest_prefix,
            fraction=fraction,
            seed=seed,
            overwrite=overwrite,
            allow_mixed_tokenizers=allow_mixed_tokenizers,
            progress=advance,
        )
    if as_json:
        held_out = {"documents": report.held_out_documents, "tokens": report.held_out_tokens}
        rest = {"documents": report.rest_documents, "tokens": report.rest_tokens}
        plain = {"held_out": {"prefix": held_out_prefix, **held_out}, "rest": {"prefix": rest_prefix, **rest}}
        print(json.dumps(plain, indent=2))
        return
    print(f"{held_out_prefix}: {report.held_out_documents:,} documents, {report.held_out_tokens:,} tokens")
    rest_name = rest_prefix or "the rest (not written)"
    print(f"{rest_name}: {report.rest_documents:,} documents, {report.rest_tokens:,} tokens")
