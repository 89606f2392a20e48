"""Command `merge`: join datasets into one."""

from __future__ import annotations

import json
import os
from typing import Annotated

import typer

from megatron_cpt.cli.progress import progress_bar
from megatron_cpt.files.whole_io import is_folder, is_regular_file

INPUT_HELP = "Datasets in this order: prefixes of .bin/.idx, or globs. A single folder: all of its datasets, by name."
MIXED_HELP = "Accept datasets whose sidecars name different tokenizers."


def merge(
    inputs: Annotated[list[str], typer.Option("--input", metavar="DIR_OR_PREFIX ...", help=INPUT_HELP)],
    output_prefix: Annotated[str, typer.Option("--output-prefix", metavar="P", help="Write P.bin and P.idx.")],
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace existing files.")] = False,
    allow_mixed_tokenizers: Annotated[bool, typer.Option("--allow-mixed-tokenizers", help=MIXED_HELP)] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Join datasets into one, as Megatron-LM's merge_datasets.py does, byte for byte."""
    from megatron_cpt.data.rewrite.merge import folder_prefixes, merge_datasets
    from megatron_cpt.data.tokenfile.reader import expand_prefixes

    names_folder = len(inputs) == 1 and is_folder(inputs[0])
    prefixes = folder_prefixes(inputs[0]) if names_folder else expand_prefixes(inputs)
    with progress_bar("merging", total_bytes(prefixes)) as advance:
        merged = merge_datasets(
            prefixes,
            output_prefix,
            overwrite=overwrite,
            allow_mixed_tokenizers=allow_mixed_tokenizers,
            progress=advance,
        )
    documents, tokens, dtype = merged.num_documents, merged.num_tokens, merged.dtype.name
    if as_json:
        plain = {"prefix": merged.prefix, "inputs": prefixes, "documents": documents, "tokens": tokens, "dtype": dtype}
        print(json.dumps(plain, indent=2))
    else:
        print(f"{merged.prefix}: {len(prefixes)} datasets, {documents:,} documents, {tokens:,} {dtype} tokens")


def total_bytes(prefixes: list[str]) -> int:
    """Return the size of all existing `.bin` files, as the total of a progress bar."""
    return sum(os.path.getsize(f"{prefix}.bin") for prefix in prefixes if is_regular_file(f"{prefix}.bin"))
