"""Command `generate`: show the text that a model writes after prompts."""

from __future__ import annotations

import enum
import json
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from megatron_cpt.cli.progress import print_note
from megatron_cpt.errors import UserError

if TYPE_CHECKING:
    from megatron_cpt.evaluate.generate_texts import GeneratedText

CHECKPOINT_HELP = "A checkpoint, or a run directory for its newest checkpoint."
MODEL_HELP = "A checkpoint, a run directory (its newest checkpoint), or a Hugging Face folder."
TOKENIZER_HELP = "Tokenizer as KIND:PATH. [default: the checkpoint's own]"
LAYOUT_HELP = "Layout and precision, such as parallel.tensor=2 or precision.compute=bf16."
WEIGHTS_HELP = "Weights of its step, or their moving average (section ema of run.yaml)."


class Weights(enum.StrEnum):
    """Weights of a checkpoint."""

    RAW = "raw"
    EMA = "ema"


WeightsOption = Annotated[Weights, typer.Option("--weights", help=WEIGHTS_HELP)]
_REASONS = {
    "stop_id": "ended by an end-of-document token",
    "stop_text": "ended by --stop",
    "max_new_tokens": "ended by --max-new-tokens",
    "max_length": "ended by the model's length",
}


def generate(
    model: Annotated[Path, typer.Argument(metavar="CKPT_OR_RUN_OR_HF_DIR", help=MODEL_HELP, show_default=False)],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[key=value ...]", help=LAYOUT_HELP)] = None,
    prompt: Annotated[
        list[str] | None, typer.Option("--prompt", metavar="TEXT", help="Text to continue; repeatable.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", metavar="N", help="Tokens per prompt.")] = 64,
    temperature: Annotated[
        float, typer.Option("--temperature", metavar="T", help="Divisor of the logits; 0 takes the most likely token.")
    ] = 0.0,
    top_p: Annotated[
        float, typer.Option("--top-p", metavar="P", help="Sample from the most likely tokens that add up to this.")
    ] = 1.0,
    top_k: Annotated[
        int, typer.Option("--top-k", metavar="K", help="Sample from this many most likely tokens; 0: all.")
    ] = 0,
    seed: Annotated[int, typer.Option("--seed", metavar="N", help="Seed of the samples.")] = 1234,
    stop: Annotated[
        list[str] | None, typer.Option("--stop", metavar="TEXT", help="Text that ends a continuation; repeatable.")
    ] = None,
    tokenizer: Annotated[str | None, typer.Option("--tokenizer", metavar="KIND:PATH", help=TOKENIZER_HELP)] = None,
    weights: WeightsOption = Weights.RAW,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show the text that a model writes after prompts, for a look at a checkpoint before and after training.

    Without a launcher it is one process; under torchrun, one rank of many. A sample depends on the seed, the prompt and
    its place among equal prompts, not on other prompts; the layout changes only the last bits of the logits.
    """
    if not prompt:
        raise UserError("--prompt: give at least one text to continue")
    from megatron_cpt.launch.environment import set_cuda_variables

    warnings.simplefilter("ignore")  # torch's and megatron-core's do not concern a reader of the text
    set_cuda_variables()  # before torch is imported, which reads them
    from megatron_cpt.backend import launched_rank
    from megatron_cpt.evaluate.generate_texts import generate_texts
    from megatron_cpt.evaluate.requests import GenerationOptions

    options = GenerationOptions(
        max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, top_k=top_k, seed=seed
    )
    rank = launched_rank()
    texts = generate_texts(
        model,
        prompt,
        options,
        stop=[text for text in stop or [] if text],
        tokenizer=tokenizer,
        overrides=overrides or [],
        weights=weights.value,
        note=print_note,
    )
    if rank != 0:
        return
    if as_json:
        print(json.dumps([text.to_dict() for text in texts], indent=2, ensure_ascii=False))
        return
    for number, text in enumerate(texts, start=1):
        _print_text(text, f"{number} of {len(texts)}")


def _print_text(text: GeneratedText, number: str) -> None:
    from megatron_cpt.config import format_number_of

    print(f"--- prompt {number}, {format_number_of(text.prompt_tokens, 'token')}")
    print(text.prompt)
    print(f"--- continuation, {format_number_of(len(text.token_ids), 'token')}, {_REASONS[text.reason]}")
    print(f"{text.text}\n")
