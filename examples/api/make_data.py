"""Write a small text and encode it as bytes: FOLDER/text.bin and FOLDER/text.idx.

python examples/api/make_data.py runs/api
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

folder = Path(sys.argv[1])
folder.mkdir(parents=True, exist_ok=True)
documents = [f"{n} times {m} is {n * m}. " * 4 for n in range(30) for m in range(30)]
lines = [json.dumps({"text": document}) + "\n" for document in documents]
(folder / "text.jsonl").write_text("".join(lines))
command = [sys.executable, "-m", "megatron_cpt", "preprocess", "--tokenizer", "byte", "--append-eod"]
subprocess.run([*command, "--input", folder / "text.jsonl", "--output-prefix", folder / "text"], check=True)
