"""Find documents of a validation set or benchmark in training data: `megatron-cpt overlap` as a script.

python tools/contamination.py --train data/web 'data/code*' --held-out data/web_val
python tools/contamination.py --train data/web --held-out exam.jsonl --tokenizer byte --key question
python tools/contamination.py --train data/web --held-out data/web_val --clean-prefix data/web_clean
"""

from __future__ import annotations

import sys

from megatron_cpt.cli import main

if __name__ == "__main__":
    sys.exit(main(["overlap", *sys.argv[1:]]))
