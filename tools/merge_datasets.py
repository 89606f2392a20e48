"""Join .bin/.idx pairs into one, with the arguments of Megatron-LM's tools/merge_datasets.py and some more.

python tools/merge_datasets.py --input DIR --output-prefix P          # every pair of a folder, by name
python tools/merge_datasets.py --input a b 'more/*' --output-prefix P # these pairs, in this order
"""

from __future__ import annotations

import argparse
import os
import sys

from megatron_cpt.cli.progress import progress_bar
from megatron_cpt.cli.tool import run_tool
from megatron_cpt.data.rewrite.merge import folder_prefixes, merge_datasets
from megatron_cpt.data.tokenfile.reader import expand_prefixes


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", nargs="+", required=True, metavar="DIR_OR_PREFIX", help="a folder, or data sets")
    parser.add_argument("--output-prefix", required=True, metavar="P", help="writes P.bin and P.idx")
    parser.add_argument("--overwrite", action="store_true", help="replace P.bin and P.idx")
    parser.add_argument("--multimodal", action="store_true", help="accepted; modes are kept wherever there are any")
    return parser.parse_args()


def merge() -> None:
    """Do it."""
    options = parse_arguments()
    is_folder = len(options.input) == 1 and os.path.isdir(options.input[0])
    prefixes = folder_prefixes(options.input[0]) if is_folder else expand_prefixes(options.input)
    size = sum(os.path.getsize(f"{prefix}.bin") for prefix in prefixes if os.path.isfile(f"{prefix}.bin"))
    with progress_bar("merging", size) as advance:
        merged = merge_datasets(prefixes, options.output_prefix, overwrite=options.overwrite, progress=advance)
    print(
        f"{merged.prefix}: {len(prefixes)} data sets, {merged.num_documents:,} documents, "
        f"{merged.num_tokens:,} {merged.dtype.name} tokens"
    )


if __name__ == "__main__":
    sys.exit(run_tool(merge))
