"""Progress bar and final summary of `preprocess`."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

from megatron_cpt.cli.progress import Rates, described_progress

if TYPE_CHECKING:
    from megatron_cpt.data.preprocess.pipeline import PreprocessReport
    from megatron_cpt.data.preprocess.preprocess_run import Notify, Progress


@contextlib.contextmanager
def encoding_progress() -> Iterator[tuple[Progress, Notify]]:
    """Show a bar with MB/s, tokens/s and time left on stderr, if stderr is a terminal.

    Yields:
        The `progress` and `notify` of `PreprocessOptions`.
    """
    from megatron_cpt.config import format_count

    rates = Rates()
    with described_progress() as (show, notify):

        def describe(bytes_done: int, bytes_total: int, documents: int, tokens: int) -> None:
            speed, token_rate = rates.since_first(bytes_done, tokens)
            found = f"{format_count(documents)} documents, {format_count(tokens)} tokens"
            show(bytes_done, bytes_total, f"{found}, {speed / 1e6:.1f} MB/s, {format_count(token_rate)} tokens/s")

        yield describe, notify


def print_report(report: PreprocessReport) -> None:
    """Print the totals, the written pairs and what was skipped."""
    seconds = max(report.seconds, 1e-9)
    print(
        f"{report.output_prefix}: {report.documents:,} documents, {report.tokens:,} {report.dtype} tokens "
        f"in {report.seconds:.1f} s ({report.text_bytes / 1e6 / seconds:.1f} MB of text per second, by {report.engine})"
    )
    if len(report.prefixes) > 1:
        print(f"written: {len(report.prefixes)} pairs, {report.prefixes[0]} to {report.prefixes[-1]}")
    if report.added_ids:
        print(report.added_ids)
    if report.empty_documents:
        print(f"skipped: {report.empty_documents:,} empty documents")
    if report.bad_lines:
        where = f", listed in {report.bad_path}" if report.bad_path else ""
        print(f"skipped: {report.bad_lines:,} bad lines{where}")
        kinds = ", ".join(f"{kind} ({count:,})" for kind, count in sorted(report.bad_reasons.items(), key=_most_first))
        print(f"  {report.bad_lines / report.lines:.2%} of the lines, {report.bad_bytes:.2%} of the bytes: {kinds}")
    for problem in report.damaged:
        print(f"damaged: {problem}")
    sys.stdout.flush()


def _most_first(item: tuple[str, int]) -> tuple[int, str]:
    return -item[1], item[0]
