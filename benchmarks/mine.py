"""Measure `mine`: documents per second and core, peak memory, and the recall of IVF-PQ.

The corpus is a .bin/.idx of 100,000 documents of about 2,000 characters: pieces of the sources and manuals of Python
and the installed packages, each piece once, in random order. The queries are 2,000 other pieces of 300 characters. Each
call is a process of its own with one worker, because the memory's peak is one of a process. Documents per second are
computed with processor seconds of the call: reading, decoding, embedding, searching, comparing and writing.

    python tools/static_embedder.py --output data/static
    python benchmarks/mine.py --embedder model2vec:data/static
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import record

ENDINGS = (".py", ".pyi", ".md", ".rst", ".txt", ".h", ".hpp", "METADATA")
CHARACTERS = 2000
QUERY_CHARACTERS = 300
WANTED = {"documents_per_cpu_second": 1000, "peak_gib": 2.0, "recall": 0.95}

CALL = """
import json, resource, sys
from megatron_cpt.cli import main
status = main(sys.argv[1:])
usage = resource.getrusage(resource.RUSAGE_SELF)
peak = next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))
used = {"cpu_seconds": usage.ru_utime + usage.ru_stime, "peak_gib": peak / 2**20}
print(json.dumps(used), file=sys.stderr)
sys.exit(status)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--embedder", required=True, help="KIND:DIR")
    parser.add_argument("--documents", type=int, default=100_000)
    parser.add_argument("--queries", type=int, default=2000)
    parser.add_argument("--range-documents", type=int, default=16384)
    parser.add_argument("--no-record", action="store_true", help="only print the result")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="mine.") as name:
        folder = Path(name)
        tokenizer = f"huggingface:{options.embedder.partition(':')[2]}/tokenizer.json"
        job = write_corpus(folder, tokenizer, options.documents, options.queries)
        runs = {
            method: measure(folder, method, options.embedder, job["documents"], options.range_documents)
            for method in ("flat", "ivf-pq")
        }
    result = {
        "what": "mine with one worker: documents per processor second, peak memory, recall@50 on a sample of queries",
        "machine": record.machine(),
        "job": job | {"range_documents": options.range_documents},
        "wanted": WANTED,
        **runs,
    }
    print(json.dumps(result, indent=2))
    if not options.no_record:
        record.write_result("mine", result)


def write_corpus(folder: Path, tokenizer: str, num_documents: int, num_queries: int) -> dict[str, Any]:
    """Write web.bin/.idx and qa.jsonl."""
    from megatron_cpt.data.preprocess.pipeline import PreprocessOptions, preprocess

    pieces = list(dict.fromkeys(read_pieces()))
    random.Random(1).shuffle(pieces)
    documents, queries = pieces[num_queries : num_queries + num_documents], pieces[:num_queries]
    for name, texts in (("web", documents), ("qa", [text[:QUERY_CHARACTERS] for text in queries])):
        with (folder / f"{name}.jsonl").open("w") as lines:
            lines.writelines(json.dumps({"text": text}) + "\n" for text in texts)
    preprocess(
        [folder / "web.jsonl"], folder / "web", tokenizer=tokenizer, options=PreprocessOptions(fast_tokenizer="off")
    )
    return {"documents": len(documents), "characters": sum(map(len, documents)), "queries": len(queries)}


def read_pieces() -> Iterator[str]:
    roots = {sysconfig.get_path("stdlib"), sysconfig.get_path("purelib")}
    files = {file for root in roots for file in Path(root).rglob("*") if file.name.endswith(ENDINGS) and file.is_file()}
    for file in sorted(files):
        text = file.read_text(errors="ignore") if file.stat().st_size < 400_000 else ""
        for first in range(0, len(text) - CHARACTERS // 2, CHARACTERS):
            yield text[first : first + CHARACTERS]


def measure(folder: Path, method: str, embedder: str, num_documents: int, range_documents: int) -> dict[str, Any]:
    arguments = [
        *("mine", "--queries", str(folder / "qa.jsonl"), "--corpus", str(folder / "web")),
        *("--output", str(folder / f"{method}.docs"), "--embedder", embedder, "--search", method, "--json"),
        *("--workers", "1", "--range-documents", str(range_documents)),
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    started = time.monotonic()
    call = subprocess.run(
        [sys.executable, "-c", CALL, *arguments], env=environment, capture_output=True, text=True, check=True
    )
    report, usage = json.loads(call.stdout), json.loads(call.stderr.splitlines()[-1])
    return {
        "documents_per_cpu_second": round(num_documents / usage["cpu_seconds"]),
        "cpu_seconds": round(usage["cpu_seconds"], 1),
        "wall_seconds": round(time.monotonic() - started, 1),
        "peak_gib": round(usage["peak_gib"], 2),
        "recall": report["recall"],
        "mined_documents": report["chosen"],
    }


if __name__ == "__main__":
    main()
