"""Continue a real pretrained model, from Hugging Face files and back, on two CPU cores:

    python examples/smollm2/demo.py

SmolLM2-135M -> `convert import` -> `convert verify` -> the two-phase recipe for 49 steps over two pipeline stages ->
`convert export` -> transformers loads the result and completes a sentence. Each command is printed before it runs.
Run the demo again to resume it.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import orjson
import pretrained
from rich.table import Table

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "examples" / "quickstart"))  # for its corpora and its walkthrough

import corpora  # noqa: E402
import results  # noqa: E402
from walkthrough import MEGATRON_CPT, TORCHRUN, Walkthrough, preprocess_sources, run_walkthrough  # noqa: E402

TEXTS = Path("data/quickstart")
DATA = Path("data/smollm2")
RUNS = Path("runs/smollm2")
SOURCES = {
    "train": ("articles", "code", "web", "boolq", "exams"),
    "heldout": ("c4", "owt", "github", "boolq", "exams"),
}
PROMPT = "The capital of France is"


def import_model(walkthrough: Walkthrough) -> None:
    """Import the Hugging Face files unless that was done, and verify the checkpoint."""
    if not (RUNS / "base").is_dir():
        walkthrough.run([*MEGATRON_CPT, "convert", "import", str(DATA / "hf"), str(RUNS / "base")])
    walkthrough.run([*MEGATRON_CPT, "convert", "verify", str(DATA / "hf"), str(RUNS / "base"), "--logits"])


def export_model(walkthrough: Walkthrough) -> None:
    """Export the trained checkpoint and complete the prompt with transformers, before and after training."""
    shutil.rmtree(RUNS / "hf", ignore_errors=True)
    walkthrough.run([*MEGATRON_CPT, "convert", "export", str(RUNS / "run"), str(RUNS / "hf")])
    for name, folder in (("before", DATA / "hf"), ("after", RUNS / "hf")):
        walkthrough.console.print(f"{name}: {complete(folder)}", markup=False)


def complete(folder: Path) -> str:
    """Return transformers' greedy completion of the prompt."""
    import transformers

    transformers.utils.logging.disable_progress_bar()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    network = transformers.AutoModelForCausalLM.from_pretrained(folder)
    ids = tokenizer(PROMPT, return_tensors="pt")
    return tokenizer.decode(network.generate(**ids, max_new_tokens=12, do_sample=False)[0])


def report(walkthrough: Walkthrough) -> None:
    """Print the held-out losses before and after training, and write `results.json`."""
    metrics = results.read_metrics(RUNS / "run")
    table = Table(title="Held-out loss, nats per token", title_justify="left")
    for heading in ("source", "before", "after", "change"):
        table.add_column(heading, justify="left" if heading == "source" else "right")
    for name, before in metrics.before.items():
        after = metrics.after[name]
        table.add_row(name, f"{before:.3f}", f"{after:.3f}", f"{after - before:+.3f}")
    walkthrough.console.print(table)
    record = {"before": metrics.before, "after": metrics.after, "seconds": walkthrough.seconds}
    (RUNS / "results.json").write_bytes(orjson.dumps(record, option=orjson.OPT_INDENT_2))


def run_steps(walkthrough: Walkthrough) -> None:
    """Run all steps of the demo."""
    with walkthrough.step("Model: SmolLM2-135M from a package, as Hugging Face files"):
        walkthrough.console.print(str(pretrained.prepare(DATA)))
    with walkthrough.step("Corpora of the quickstart"):
        walkthrough.console.print(corpora.accounts_table(corpora.prepare(TEXTS)))
    with walkthrough.step("Text to tokens, with the model's own tokenizer"):
        tokenizer = DATA / "hf"
        preprocess_sources(
            walkthrough, SOURCES, TEXTS / "text", DATA, f"huggingface:{tokenizer}", tokenizer / "tokenizer.json"
        )
    with walkthrough.step("Hugging Face -> checkpoint, verified"):
        RUNS.mkdir(parents=True, exist_ok=True)
        import_model(walkthrough)
    with walkthrough.step("The recipe over two pipeline stages"):
        walkthrough.run([*TORCHRUN, "-m", "megatron_cpt", "train", "examples/smollm2/run.yaml"])
    with walkthrough.step("Checkpoint -> Hugging Face"):
        export_model(walkthrough)
    with walkthrough.step("Results"):
        report(walkthrough)
    walkthrough.console.print(walkthrough.times())


if __name__ == "__main__":
    sys.exit(run_walkthrough(__doc__, RUNS, run_steps))
