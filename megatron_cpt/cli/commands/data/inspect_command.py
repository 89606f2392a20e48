"""Command `inspect`: show the size, document lengths and documents of a dataset."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from megatron_cpt.errors import UserError

if TYPE_CHECKING:
    from megatron_cpt.data.inspect.summary import Document, Summary
    from megatron_cpt.data.tokenizers.tokenizer import Tokenizer

TOKENIZER_HELP = "sentencepiece:tokenizer.model, huggingface:DIR_OR_tokenizer.json or byte, to show text."
_SHOWN_DOCUMENTS = 3
_SHOWN_TOKENS = 64  # per document


def inspect(
    prefix: Annotated[str, typer.Argument(metavar="PREFIX", help="Dataset: prefix of .bin/.idx.")],
    document: Annotated[int | None, typer.Option("--document", metavar="N", help="Show document N (from 0).")] = None,
    tokenizer: Annotated[str | None, typer.Option("--tokenizer", metavar="KIND:PATH", help=TOKENIZER_HELP)] = None,
    plot: Annotated[
        Path | None, typer.Option("--plot", metavar="FILE.png", help="Also plot the document lengths.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show the size of a dataset and the lengths of its documents, or a single document with --document.

    With --tokenizer, documents are decoded; without --document, the start of the first few is shown.
    """
    from megatron_cpt.data.inspect.summary import get_document, summarize
    from megatron_cpt.data.tokenfile.listed_documents import open_dataset
    from megatron_cpt.data.tokenfile.reader import expand_prefixes
    from megatron_cpt.data.tokenizers.tokenizer import load_tokenizer

    names = expand_prefixes(prefix)
    if len(names) > 1:
        raise UserError(f"{prefix}: {len(names)} datasets; give one of them: {', '.join(names[:5])}")
    dataset = open_dataset(names[0])
    codec = None if tokenizer is None else load_tokenizer(tokenizer)
    if document is not None:
        shown = get_document(dataset, document)
        if as_json:
            print(json.dumps(_document_json(shown, codec)))
        else:
            _print_document(shown, codec)
        return
    summary = summarize(dataset)
    if plot is not None:
        from megatron_cpt.views.lengths_plot import plot_lengths

        plot_lengths(summary, plot)
    numbers = range(min(_SHOWN_DOCUMENTS, dataset.num_documents)) if codec is not None else ()
    first = [get_document(dataset, number) for number in numbers]
    if as_json:
        print(
            json.dumps(summary.to_dict() | {"first_documents": [_document_json(one, codec) for one in first]}, indent=2)
        )
        return
    _print_summary(summary)
    for one in first:
        print()
        _print_document(one, codec, most=_SHOWN_TOKENS)


def decode(codec: Tokenizer, ids: Sequence[int], where: str) -> str:
    """Decode ids; `where` is the file or document of the ids, for the message.

    Raises:
        UserError: the tokenizer does not have one of the ids.
    """
    unknown = next((i for i in ids if not 0 <= i < codec.vocab_size), None)
    if unknown is not None:
        raise UserError(
            f"{where}: id {unknown} is not one of the tokenizer's {codec.vocab_size} ids; give the tokenizer that the "
            "data was made with"
        )
    return codec.decode(ids)


def _print_summary(summary: Summary) -> None:
    from megatron_cpt.config import format_count
    from megatron_cpt.data.inspect.summary import draw_histogram

    print(f"{summary.prefix}: {summary.documents:,} documents, {summary.tokens:,} {summary.dtype} tokens")
    print(f"  {format_count(summary.bytes)} bytes, {summary.sequences:,} sequences, fingerprint {summary.fingerprint}")
    if summary.mean is not None:
        print(f"  tokens per document: {summary.shortest:,} to {summary.longest:,}, mean {summary.mean:,.1f}")
        print("  " + ", ".join(f"p{key} {value:,}" for key, value in summary.percentiles.items()))
        print()
        for line in draw_histogram(summary.histogram):
            print(f"  {line}")


def _print_document(document: Document, codec: Tokenizer | None, most: int | None = None) -> None:
    ids = document.ids.tolist()
    end = document.first_token + len(ids)
    print(f"document {document.number}: tokens {document.first_token:,} to {end:,} of the file, {len(ids):,} tokens")
    shown = ids[:most]
    dots = " ..." if len(shown) < len(ids) else ""
    print(" ".join(map(str, shown)) + dots)
    if codec is not None:
        print(decode(codec, shown, f"document {document.number}") + dots)


def _document_json(document: Document, codec: Tokenizer | None) -> dict[str, Any]:
    ids = document.ids.tolist()
    text = {} if codec is None else {"text": decode(codec, ids, f"document {document.number}")}
    return {
        "document": document.number,
        "first_token": document.first_token,
        "num_tokens": len(ids),
        "ids": ids,
        **text,
    }
