"""`megatron-cpt check`: is a data set sound?"""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING, Annotated

import typer

from megatron_cpt.cli.progress import progress_bar
from megatron_cpt.errors import EXIT_REFUSED

if TYPE_CHECKING:
    from megatron_cpt.data.inspect.check import CheckReport

PREFIXES_HELP = "Data sets: prefixes of .bin/.idx, or globs."
EOD_HELP = "Documents must end with this id; left out: the id that most of them end with."


def check(
    prefixes: Annotated[list[str], typer.Argument(metavar="PREFIX ...", help=PREFIXES_HELP, show_default=False)],
    vocab_size: Annotated[
        int | None, typer.Option("--vocab-size", metavar="N", min=1, help="Every id must be below it.")
    ] = None,
    eod_id: Annotated[int | None, typer.Option("--eod-id", metavar="ID", min=0, help=EOD_HELP)] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Do not look for duplicate documents.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the findings as JSON.")] = False,
) -> None:
    """Check data sets through and through: the index, the sizes, every id, every document.

    Exit status 0: all are sound, perhaps with warnings; 3: one is not; 2: there is no such file.
    """
    from megatron_cpt.data.inspect.check import check_dataset
    from megatron_cpt.data.tokenfile.reader import expand_prefixes

    names = expand_prefixes(prefixes)
    size = sum(os.path.getsize(f"{name}.bin") for name in names if os.path.isfile(f"{name}.bin"))
    with progress_bar("checking", size) as advance:
        reports = [
            check_dataset(
                name,
                vocab_size=vocab_size,
                eod_id=eod_id,
                duplicates=not quick,
                progress=advance,
            )
            for name in names
        ]
    sound = all(report.is_valid for report in reports)
    if as_json:
        print(json.dumps({"sound": sound, "data_sets": [report.to_dict() for report in reports]}, indent=2))
    else:
        for report in reports:
            _print(report)
    if not sound:
        raise typer.Exit(EXIT_REFUSED)


def _print(report: CheckReport) -> None:
    faults = f"{len(report.faults)} fault{'' if len(report.faults) == 1 else 's'}"
    print(f"{report.prefix}: {'sound' if report.is_valid else f'NOT SOUND, {faults}'}")
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
        copies = "not looked for" if documents.num_duplicates is None else f"{documents.num_duplicates:,}"
        print(f"  end-of-document id: {documents.eod_id}; empty: {documents.num_empty:,}; duplicates: {copies}")
    if report.fingerprint is not None:
        print(f"  fingerprint {report.fingerprint}")
    for finding in report.findings:
        print(f"  {finding.level}: {finding}")
