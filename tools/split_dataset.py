"""Hold documents out, or draw a sample: `megatron-cpt split` as a script.

python tools/split_dataset.py --input data/web --fraction 0.01 --held-out-prefix web_val --rest-prefix web_train
python tools/split_dataset.py --input data/web --fraction 0.1 --held-out-prefix web_tenth      # a sample
"""

from __future__ import annotations

import sys

from megatron_cpt.cli import main

if __name__ == "__main__":
    sys.exit(main(["split", *sys.argv[1:]]))
