"""Hold documents out, or draw a sample, by a hash of their content.

    python tools/split_dataset.py --input data/web --fraction 0.01 --held-out-prefix web_val --rest-prefix web_train
    python tools/split_dataset.py --input data/web --fraction 0.1 --held-out-prefix web_tenth      # a sample

A document's side depends on its ids and the seed alone, so copies of it fall on the same side, and it stays there when
the corpus grows.
"""

from __future__ import annotations

import argparse
import os
import sys

from megatron_cpt.cli.progress import progress_bar
from megatron_cpt.cli.tool import run_tool
from megatron_cpt.data.rewrite.split import split_datasets
from megatron_cpt.data.tokenfile.reader import expand_prefixes


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", nargs="+", required=True, metavar="PREFIX", help="data sets, or globs")
    parser.add_argument("--fraction", type=float, required=True, help="of the documents, above 0 and below 1")
    parser.add_argument("--held-out-prefix", required=True, metavar="P", help="where the fraction goes")
    parser.add_argument("--rest-prefix", metavar="P", help="where the other documents go; left out: nowhere")
    parser.add_argument("--seed", type=int, default=1234, help="another seed draws others")
    parser.add_argument("--overwrite", action="store_true", help="replace what is there")
    return parser.parse_args()


def split() -> None:
    """Do it."""
    options = parse_arguments()
    prefixes = expand_prefixes(options.input)
    size = sum(os.path.getsize(f"{prefix}.bin") for prefix in prefixes if os.path.isfile(f"{prefix}.bin"))
    with progress_bar("splitting", size) as advance:
        report = split_datasets(
            prefixes,
            options.held_out_prefix,
            options.rest_prefix,
            fraction=options.fraction,
            seed=options.seed,
            overwrite=options.overwrite,
            progress=advance,
        )
    print(f"{options.held_out_prefix}: {report.held_out_documents:,} documents, {report.held_out_tokens:,} tokens")
    written = options.rest_prefix or "the rest (not written)"
    print(f"{written}: {report.rest_documents:,} documents, {report.rest_tokens:,} tokens")


if __name__ == "__main__":
    sys.exit(run_tool(split))
