"""Which documents of a validation or benchmark set does a training set contain, in whole or in part?

    python tools/contamination.py --train data/web 'data/code*' --held-out data/web_val
    python tools/contamination.py --train data/web --held-out exam.jsonl --tokenizer byte --key question
    python tools/contamination.py --train data/web --held-out data/web_val --clean-prefix data/web_clean

Two documents overlap where --ngram ids in a row are the same. A held-out document is "exact" where the training set has
a copy of it, "near" where one training document has 80 % (--near) of its n-grams, "partial" where an n-gram is found at
all, "short" where it has fewer ids than an n-gram and no copy. Status 0, whatever is found.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np

from megatron_cpt.cli.progress import progress_bar
from megatron_cpt.cli.tool import run_tool
from megatron_cpt.data.contamination.held_out import held_out_documents
from megatron_cpt.data.contamination.overlap import NEAR, NGRAM, HeldOutSet, OverlapReport, find_overlap
from megatron_cpt.data.rewrite.merge import require_free
from megatron_cpt.data.rewrite.split import select
from megatron_cpt.data.tokenfile.reader import IndexedDataset, IndexedDatasetWriter, expand_prefixes
from megatron_cpt.data.tokenizers.tokenizer import load_tokenizer

_SHOWN = 20


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", nargs="+", required=True, metavar="PREFIX", help="training data sets, or globs")
    parser.add_argument("--held-out", nargs="+", required=True, metavar="PREFIX_OR_JSONL", help="what to look for")
    parser.add_argument("--tokenizer", metavar="KIND:PATH", help="that of the training data: needed for JSON Lines")
    parser.add_argument(
        "--key", nargs="+", default=["text"], help="fields of JSON Lines that hold text, each for itself"
    )
    parser.add_argument("--eod-id", type=int, help="dropped from ends of documents; left out: the tokenizer's")
    parser.add_argument("--ngram", type=int, default=NGRAM, help=f"ids in a row that count ({NGRAM})")
    parser.add_argument("--near", type=float, default=NEAR, help=f"share of n-grams that makes a near copy ({NEAR})")
    parser.add_argument("--clean-prefix", metavar="P", help="write the training documents that share nothing here")
    parser.add_argument("--overwrite", action="store_true", help="replace P.bin and P.idx")
    parser.add_argument("--json", action="store_true", help="print everything as JSON")
    return parser.parse_args()


def compare() -> None:
    """Do it."""
    options = parse_arguments()
    training = [IndexedDataset(prefix) for prefix in expand_prefixes(options.train)]
    tokenizer = load_tokenizer(options.tokenizer) if options.tokenizer else None
    eod_id = options.eod_id if options.eod_id is not None or tokenizer is None else tokenizer.eod_id
    documents = held_out_documents(options.held_out, tokenizer, options.key)
    held_out = HeldOutSet(documents, ngram=options.ngram, eod_id=eod_id)
    size = sum(dataset.num_tokens for dataset in training)
    with progress_bar("comparing", size) as advance, _clean_writer(options, training) as writer:

        def on_block(dataset: IndexedDataset, block: Any, is_hit: Any) -> None:
            if writer is not None:
                writer.add_documents(*select(block, np.logical_not(is_hit)))
            advance(block.tokens.size)

        report = find_overlap(training, held_out, near=options.near, on_block=on_block)
    if options.json:
        print(json.dumps(report.to_dict(), indent=2))
    else:
        print_report(report)


@contextlib.contextmanager
def _clean_writer(options: argparse.Namespace, training: list[IndexedDataset]) -> Iterator[IndexedDatasetWriter | None]:
    if options.clean_prefix is None:
        yield None
        return
    require_free(options.clean_prefix, [dataset.prefix for dataset in training], overwrite=options.overwrite)
    with IndexedDatasetWriter(options.clean_prefix, np.result_type(*(one.dtype for one in training))) as writer:
        yield writer


def print_report(report: OverlapReport) -> None:
    """Counts, the held-out documents that were found, the training documents that hold most."""
    counts = ", ".join(f"{count:,} {verdict}" for verdict, count in report.counts().items())
    print(f"{len(report.held_out):,} held-out documents: {counts} ({report.ngram} ids in a row)")
    print(
        f"{report.training_hits:,} of {report.training_documents:,} training documents ({report.training_tokens:,} "
        "tokens) share something with them"
    )
    found = [one for one in report.held_out if one.copies or one.found]
    for one in sorted(found, key=lambda one: (one.copies > 0, one.best_shared / max(1, one.ngrams)), reverse=True)[
        :_SHOWN
    ]:
        print(
            f"  {one.verdict(report.near):8}{one.name}: {one.best_shared} of {one.ngrams} n-grams in "
            f"{one.best_prefix} document {one.best_document}, {one.found} in all"
        )
    if len(found) > _SHOWN:
        print(f"  and {len(found) - _SHOWN:,} more: --json lists them all")


if __name__ == "__main__":
    sys.exit(run_tool(compare))
