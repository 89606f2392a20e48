"""Time of a training step with a cached teacher over a step without a teacher.

    nice -n 15 python benchmarks/cached_teacher.py [--blocks 5] [--steps 3] [--vocab 8192] [--layers 16] [--hidden 256]

One process, one model, one optimizer, and two loaders of the same samples: one reads the records of a cache, the other
does not. Blocks of steps with and without the teacher alternate, so slow changes of the machine affect both. The result
is the median ratio of neighboring blocks, in wall time and in processor time, which includes the loader's thread.

The records are drawn at random, because their values do not change the work. The default model has about the share of
the output layer in the FLOPs that a 15B model has (14 % and 10 %), because the loss reads every logit.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from record import machine, write_result

from megatron_cpt.data import IndexedDataset, IndexedDatasetWriter
from megatron_cpt.data.loading.batch import DocumentOptions
from megatron_cpt.data.teacher_cache.cache_header import HEADER_FILE, CacheHeader, TaughtFile, file_name
from megatron_cpt.data.teacher_cache.top_k_records import record_seeds
from megatron_cpt.data.tokenfile.fingerprint import fingerprint
from megatron_cpt.prepare import prepare_run
from megatron_cpt.train.trainer import Trainer

SEQ_LENGTH, GLOBAL, MICRO, TOP_K = 256, 8, 4, 64
CLOCKS = {"wall": time.perf_counter, "processor": time.process_time}


def main() -> None:
    """Run the benchmark and write its result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, default=5, help="blocks of each kind")
    parser.add_argument("--steps", type=int, default=3, help="steps of a block")
    parser.add_argument("--vocab", type=int, default=8192)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--hidden", type=int, default=256)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        seconds = run(Path(folder), options)
    ratios = {
        clock: statistics.median(one / other for one, other in zip(*by_kind.values(), strict=True))
        for clock, by_kind in seconds.items()
    }
    for clock, ratio in ratios.items():
        print(f"{clock} time: {ratio - 1:+.2%} over steps without a teacher")
    write_result(
        "cached_teacher",
        {
            "machine": machine(),
            "what": f"{options.layers} layers, hidden {options.hidden}, {options.vocab:,} ids, {GLOBAL} x {SEQ_LENGTH} "
            f"tokens per step, fp32, top {TOP_K}, one process",
            "steps_per_block": options.steps,
            "seconds": seconds,
            "ratio": ratios,
            "target": "at most 1.05",
        },
    )


def run(folder: Path, options: argparse.Namespace) -> dict[str, dict[str, list[float]]]:
    """Return the seconds of each block, by clock and kind."""
    from megatron_cpt.train.device_batch import make_upload
    from megatron_cpt.train.open_data import build_loader, open_streams

    steps = (options.blocks + 1) * options.steps
    prepared = prepare_run(write_run(folder, options, steps), need_files=True)
    with Trainer(prepared, console=False) as trainer, ExitStack() as stack:
        session = trainer.session
        plain = build_loader(
            session.config,
            session.plan,
            session.ranks,
            open_streams(session.config, None),
            DocumentOptions(),
            session.state,
            None,
            make_upload(session.ranks.device, packs_documents=False),
        )
        stack.enter_context(plain)
        kinds: dict[str, Callable[[], Any]] = {
            "with teacher": lambda: one_step(session, session.forward, session.loader),
            "without": lambda: one_step(session, replace(session.forward, distillation=None), plain),
        }
        seconds: dict[str, dict[str, list[float]]] = {clock: {kind: [] for kind in kinds} for clock in CLOCKS}
        for block in range(options.blocks + 1):
            order = list(kinds.items())
            for kind, step in order if block % 2 else reversed(order):  # a trend of the machine cancels out
                starts = {clock: read() for clock, read in CLOCKS.items()}
                for _ in range(options.steps):
                    step()
                for clock, read in CLOCKS.items():
                    if block:  # the first blocks warm up
                        seconds[clock][kind].append(read() - starts[clock])
    return seconds


def one_step(session: Any, forward: Any, loader: Any) -> None:
    """Run one training step."""
    from megatron_cpt.train.step import train_step

    train_step(
        forward,
        session.update,
        loader.next_step(),
        1e-4,
        contributes_loss=True,
        requests=lambda: [False],
        judge=lambda *_: None,
        before_update=lambda: None,
    )


def write_run(folder: Path, options: argparse.Namespace, steps: int) -> Path:
    """Write a run over random tokens, and a cache for it."""
    rng = np.random.default_rng(0)
    with IndexedDatasetWriter(str(folder / "web"), np.uint16) as writer:
        writer.add_document(rng.integers(0, options.vocab, size=100_001).astype(np.uint16))
    write_cache(folder, options.vocab, rng)
    run = {
        "name": "cached-teacher",
        "output": str(folder / "out"),
        "model": {
            "preset": "tiny_llama",
            "vocab": options.vocab,
            "layers": options.layers,
            "hidden": options.hidden,
            "ffn_hidden": 3 * options.hidden,
            "head_dim": options.hidden // 8,
        },
        "seq_length": SEQ_LENGTH,
        "batch": {"global": GLOBAL, "micro": MICRO},
        "tokens": steps * GLOBAL * SEQ_LENGTH,
        "schedule": {"max_lr": 1e-4, "min_lr": 1e-6},
        "sources": {"web": {"path": str(folder / "web")}},
        "phases": [{"name": "one", "blend": {"web": 1.0}}],
        "precision": {"compute": "fp32"},
        "teacher": {"cache": str(folder / "cache"), "weight": 0.5},
    }
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(run))
    return path


def write_cache(folder: Path, vocab: int, rng: np.random.Generator) -> None:
    """Write a cache with random ids."""
    dataset = IndexedDataset(str(folder / "web"))
    file = TaughtFile("web", dataset.prefix, fingerprint([dataset]), dataset.num_tokens)
    header = CacheHeader(
        teacher="random",
        teacher_path="none",
        precision={},
        tokenizer=None,
        vocab=vocab,
        top_k=TOP_K,
        window=SEQ_LENGTH,
        stride=SEQ_LENGTH,
        documents=DocumentOptions().attention_key,
        files=(file,),
    )
    count = header.num_positions
    ids = (rng.integers(0, vocab, size=(count, 1)) + np.arange(TOP_K)) % vocab
    log_probs = np.broadcast_to(np.log(0.9 / TOP_K), ids.shape)
    records = header.records.make(ids, log_probs, np.full(count, np.log(0.1)), record_seeds(header.key(0), 0, count))
    (folder / "cache").mkdir()
    (folder / "cache" / file_name(0)).write_bytes(records.tobytes())
    (folder / "cache" / HEADER_FILE).write_bytes(header.to_bytes())


if __name__ == "__main__":
    main()
