"""Join .bin/.idx pairs into one, with the arguments of Megatron-LM's tools/merge_datasets.py.

    python tools/merge_datasets.py --input DIR --output-prefix P [--multimodal]

This is `megatron-cpt merge`. `--multimodal` is accepted and has no effect: modes are always kept.
"""

from __future__ import annotations

import sys

from megatron_cpt.cli import main

if __name__ == "__main__":
    sys.exit(main(["merge", *(argument for argument in sys.argv[1:] if argument != "--multimodal")]))
