"""Command `overlap`: find held-out documents in training data."""

from __future__ import annotations

import contextlib
import json
from typing import TYPE_CHECKING, Annotated

import typer

from megatron_cpt.cli.progress import progress_bar

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from megatron_cpt.data.contamination.overlap import OverlapReport
    from megatron_cpt.data.tokenfile.documents import DocumentBlock
    from megatron_cpt.data.tokenfile.reader import IndexedDataset
    from megatron_cpt.data.tokenfile.writer import IndexedDatasetWriter

HELD_OUT_HELP = "Documents to find: prefixes of .bin/.idx, globs, or .jsonl and .json files as benchmarks have."
TOKENIZER_HELP = "Tokenizer of the training data, required for JSON Lines."
KEY_HELP = "Fields of JSON Lines that hold text; each field is a document. [default: text]"
EOD_HELP = "Id removed from the end of documents before they are compared. [default: the tokenizer's]"
_MOST_SHOWN = 20


def overlap(
    train: Annotated[
        list[str],
        typer.Option("--train", metavar="PREFIX ...", help="Training datasets: prefixes, document lists, or globs."),
    ],
    held_out: Annotated[list[str], typer.Option("--held-out", metavar="PREFIX_OR_JSONL ...", help=HELD_OUT_HELP)],
    tokenizer: Annotated[str | None, typer.Option("--tokenizer", metavar="KIND:PATH", help=TOKENIZER_HELP)] = None,
    key: Annotated[list[str] | None, typer.Option("--key", metavar="K ...", help=KEY_HELP)] = None,
    eod_id: Annotated[int | None, typer.Option("--eod-id", metavar="ID", help=EOD_HELP)] = None,
    ngram: Annotated[int, typer.Option("--ngram", metavar="N", help="Number of consecutive ids that must match.")] = 13,
    near: Annotated[float, typer.Option("--near", metavar="SHARE", help="Share of n-grams of a near copy.")] = 0.8,
    clean_prefix: Annotated[
        str | None, typer.Option("--clean-prefix", metavar="P", help="Write training documents without overlap here.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace P.bin and P.idx.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the complete result as JSON.")] = False,
) -> None:
    """Find documents of a validation set or benchmark in training data.

    Two documents overlap if --ngram consecutive ids are equal. Each held-out document is "exact" (training has a copy),
    "near" (one training document has 80 % of its n-grams, see --near), "partial" (training has at least one of its
    n-grams), "clean", or "short" (fewer ids than an n-gram, and no copy). The exit status is 0
    whether or not documents overlap.
    """

    from megatron_cpt.data.contamination.held_out import held_out_documents
    from megatron_cpt.data.contamination.overlap import HeldOutSet, find_overlap
    from megatron_cpt.data.rewrite.split import select
    from megatron_cpt.data.tokenfile.listed_documents import open_source
    from megatron_cpt.data.tokenizers.tokenizer import load_tokenizer

    training = open_source(train)
    codec = load_tokenizer(tokenizer) if tokenizer else None
    if eod_id is None and codec is not None:
        eod_id = codec.eod_id
    documents = held_out_documents(held_out, codec, key or ["text"])
    held_out_set = HeldOutSet(documents, ngram=ngram, eod_id=eod_id)
    num_tokens = sum(dataset.num_tokens for dataset in training)
    clean = (
        contextlib.nullcontext() if clean_prefix is None else _clean_writer(clean_prefix, training, held_out, overwrite)
    )
    with progress_bar("comparing", num_tokens) as advance, clean as writer:

        def on_block(dataset: IndexedDataset, block: DocumentBlock, is_hit: npt.NDArray[np.bool_]) -> None:
            if writer is not None:
                writer.add_documents(*select(block, ~is_hit))
            advance(block.tokens.size)

        report = find_overlap(training, held_out_set, near=near, on_block=on_block)
    if as_json:
        print(json.dumps(report.to_dict(), indent=2))
    else:
        _print_report(report)


def _clean_writer(
    prefix: str, training: list[IndexedDataset], held_out: list[str], overwrite: bool
) -> IndexedDatasetWriter:
    import numpy as np

    from megatron_cpt.data.contamination.held_out import JSON_LINES
    from megatron_cpt.data.tokenfile.reader import expand_prefixes
    from megatron_cpt.data.tokenfile.writer import IndexedDatasetWriter, require_free

    pairs = [pair for name in held_out if not name.endswith(JSON_LINES) for pair in expand_prefixes(name)]
    require_free(prefix, [*(dataset.prefix for dataset in training), *pairs], overwrite=overwrite)
    return IndexedDatasetWriter(prefix, np.result_type(*(dataset.dtype for dataset in training)))


def _print_report(report: OverlapReport) -> None:
    counts = ", ".join(f"{count:,} {verdict}" for verdict, count in report.counts().items())
    print(f"{len(report.held_out):,} held-out documents: {counts} (n-grams of {report.ngram} ids)")
    print(
        f"{report.training_hits:,} of {report.training_documents:,} training documents ({report.training_tokens:,} "
        "tokens) overlap with them"
    )
    found = [document for document in report.held_out if document.copies or document.found]
    found.sort(key=lambda document: (document.copies > 0, document.best_shared / max(1, document.ngrams)), reverse=True)
    for document in found[:_MOST_SHOWN]:
        print(
            f"  {document.verdict(report.near):8}{document.name}: {document.best_shared} of {document.ngrams} n-grams "
            f"in {document.best_prefix} document {document.best_document}, {document.found} in all documents"
        )
    if len(found) > _MOST_SHOWN:
        print(f"  and {len(found) - _MOST_SHOWN:,} more: --json lists all of them")
