"""Command `check`: validate datasets."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated

import typer

from megatron_cpt.cli.commands.data.merge_command import total_bytes
from megatron_cpt.cli.progress import progress_bar
from megatron_cpt.errors import EXIT_REFUSED

if TYPE_CHECKING:
    from megatron_cpt.data.inspect.check import CheckReport

PREFIXES_HELP = "Datasets: prefixes of .bin/.idx, document lists NAME.docs with their datasets, or globs."
EOD_HELP = "Id that documents must end with. [default: the id in PREFIX.json]"
TOKENIZER_HELP = "Tokenizer that the ids must be of, by the fingerprint in PREFIX.json."
LENGTH_HELP = "Warn of datasets that are too short for a sample of N tokens."


def check(
    prefixes: Annotated[list[str], typer.Argument(metavar="PREFIX ...", help=PREFIXES_HELP, show_default=False)],
    vocab_size: Annotated[
        int | None,
        typer.Option("--vocab-size", metavar="N", min=1, help="Every id must be below N."),
    ] = None,
    eod_id: Annotated[int | None, typer.Option("--eod-id", metavar="ID", min=0, help=EOD_HELP)] = None,
    tokenizer: Annotated[str | None, typer.Option("--tokenizer", metavar="KIND:PATH", help=TOKENIZER_HELP)] = None,
    seq_length: Annotated[int | None, typer.Option("--seq-length", metavar="N", min=1, help=LENGTH_HELP)] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Skip the search for duplicate documents.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the findings as JSON.")] = False,
) -> None:
    """Validate datasets completely: the index, file sizes, every id, every document, the hashes in PREFIX.json.

    Exit status 0: all datasets are valid, perhaps with warnings; 3: a dataset is invalid; 2: a file does not exist.
    """
    from megatron_cpt.data.inspect.check import check_dataset, with_listed_pairs
    from megatron_cpt.data.tokenfile.reader import expand_prefixes

    names = with_listed_pairs(expand_prefixes(prefixes))
    with progress_bar("checking", total_bytes(names)) as advance:
        reports = [
            check_dataset(
                name,
                vocab_size=vocab_size,
                eod_id=eod_id,
                tokenizer=tokenizer,
                seq_length=seq_length,
                duplicates=not quick,
                progress=advance,
            )
            for name in names
        ]
    are_valid = all(report.is_valid for report in reports)
    if as_json:
        print(json.dumps({"sound": are_valid, "data_sets": [report.to_dict() for report in reports]}, indent=2))
    else:
        for report in reports:
            _print_report(report)
    if not are_valid:
        raise typer.Exit(EXIT_REFUSED)


def _print_report(report: CheckReport) -> None:
    faults = f"{len(report.faults)} fault{'' if len(report.faults) == 1 else 's'}"
    print(f"{report.prefix}: {'valid' if report.is_valid else f'INVALID, {faults}'}")
    if report.header is not None:
        header = report.header
        print(f"  {header.num_documents:,} documents, {header.num_tokens:,} {header.dtype.name} tokens")
    if report.scan is not None and report.scan.max_id is not None:
        scan = report.scan
        speed = f"{scan.gigabytes_per_second:.2f} GB/s" if scan.num_bytes > 1e7 else f"{scan.num_bytes:,} bytes"
        bound = f", of a vocabulary of {report.vocab_size:,}" if report.vocab_size is not None else ""
        print(f"  largest id {scan.max_id:,}{bound} (all ids read: {speed})")
    if report.documents is not None:
        documents = report.documents
        copies = "not searched" if documents.num_duplicates is None else f"{documents.num_duplicates:,}"
        end = f"{documents.eod_id}"
        if documents.eod_id is None:
            likely, share = documents.likely_eod_id, documents.likely_share
            end = "unknown" if likely is None else f"unknown ({share:.1%} of the documents end with id {likely})"
        print(f"  end-of-document id: {end}; empty: {documents.num_empty:,}; duplicates: {copies}")
    if report.sidecar is not None:
        content = "differs" if any(finding.kind == "content" for finding in report.findings) else "verified"
        print(f"  tokenizer {report.sidecar.origin.name}; content {content} by {report.prefix}.json")
    elif report.documents is not None:
        print("  no sidecar: tokenizer and content are unknown")
    if report.fingerprint is not None:
        print(f"  fingerprint {report.fingerprint}")
    for finding in report.findings:
        print(f"  {finding.level}: {finding}")
