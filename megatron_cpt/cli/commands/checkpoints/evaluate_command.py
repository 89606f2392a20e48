"""`megatron-cpt evaluate`: benchmarks of lm-evaluation-harness on a checkpoint or a Hugging Face folder."""

from __future__ import annotations

import contextlib
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated

import typer

from megatron_cpt.cli.commands.checkpoints.generate_command import LAYOUT_HELP, MODEL_HELP, Weights, WeightsOption
from megatron_cpt.cli.progress import print_note, progress_bar
from megatron_cpt.errors import UserError

TASKS_HELP = "Tasks, groups or tags of lm-evaluation-harness, patterns such as 'mmlu_*', or task files."
OUTPUT_HELP = "JSON file to write; answers are kept beside it, so the same command resumes. Without: nothing is kept."
CACHE_HELP = "SQLite file of finished requests. [default: finished_requests.sqlite beside the output]"
TOKENIZER_HELP = "Tokenizer of the model. [default: the run's, or the one imported with the weights]"
BOS_HELP = "Put the start id in front of every prompt, or never. [default: as the tokenizer's template does]"


def evaluate(
    model: Annotated[Path, typer.Argument(metavar="CKPT_OR_RUN_OR_HF_DIR", help=MODEL_HELP, show_default=False)],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[key=value ...]", help=LAYOUT_HELP)] = None,
    tasks: Annotated[list[str] | None, typer.Option("--tasks", metavar="TASK ...", help=TASKS_HELP)] = None,
    output: Annotated[Path | None, typer.Option("--output", metavar="FILE.json", help=OUTPUT_HELP)] = None,
    limit: Annotated[
        int | None, typer.Option("--limit", metavar="N", min=1, help="Documents per task. [default: all]")
    ] = None,
    num_fewshot: Annotated[
        int | None,
        typer.Option("--num-fewshot", metavar="N", min=0, help="Examples in each prompt. [default: as the task says]"),
    ] = None,
    batch_size: Annotated[
        int | None,
        typer.Option("--batch-size", metavar="N", min=1, help="Rows in flight; answers do not depend on it."),
    ] = None,
    include_path: Annotated[
        Path | None, typer.Option("--include-path", metavar="DIR", help="Folder with task files of your own.")
    ] = None,
    log_samples: Annotated[
        bool, typer.Option("--log-samples", help="Also write documents, prompts and answers beside the output.")
    ] = False,
    allow_code_execution: Annotated[
        bool, typer.Option("--allow-code-execution", help="Run programs that the model writes, for tasks that need it.")
    ] = False,
    cache: Annotated[Path | None, typer.Option("--cache", metavar="FILE", help=CACHE_HELP)] = None,
    tokenizer: Annotated[str | None, typer.Option("--tokenizer", metavar="KIND:PATH", help=TOKENIZER_HELP)] = None,
    add_bos: Annotated[bool | None, typer.Option("--add-bos/--no-add-bos", help=BOS_HELP, show_default=False)] = None,
    max_length: Annotated[
        int | None,
        typer.Option("--max-length", metavar="N", min=2, help="Tokens per sequence. [default: the model's positions]"),
    ] = None,
    weights: WeightsOption = Weights.RAW,
    online: Annotated[bool, typer.Option("--online", help="Let datasets be downloaded from the Hub.")] = False,
) -> None:
    """Evaluate a model on tasks of lm-evaluation-harness, alone or on every rank under torchrun or `launch`.

    Prints a table with standard errors. A second evaluation of the same weights computes only new requests.
    """
    names = [name for entry in tasks or [] for name in entry.split(",") if name]
    if not names:
        raise UserError("--tasks: give at least one task, for example --tasks hellaswag mmlu")
    from megatron_cpt.evaluate.harness_context import set_environment
    from megatron_cpt.launch.environment import set_cuda_variables

    set_cuda_variables()  # before torch is imported, which reads them
    set_environment(online=online)  # before the harness is imported
    warnings.simplefilter("ignore")  # torch's and megatron-core's do not concern a reader of the results
    from megatron_cpt.config.launcher import read_launcher
    from megatron_cpt.evaluate.evaluate_checkpoint import EvaluateOptions
    from megatron_cpt.evaluate.evaluate_checkpoint import evaluate as run

    options = EvaluateOptions(
        overrides=overrides or [],
        limit=limit,
        num_fewshot=num_fewshot,
        include_path=str(include_path) if include_path is not None else None,
        batch_size=batch_size,
        max_length=max_length,
        tokenizer=tokenizer,
        add_bos=add_bos,
        cache=cache,
        log_samples=log_samples,
        allow_code_execution=allow_code_execution,
        online=online,
        weights=weights.value,
    )
    with evaluation_progress(
        is_main=read_launcher().rank == 0, is_kept=output is not None or cache is not None
    ) as advance:
        results = run(model, names, output, options, advance=advance, note=print_note)
    if results is not None:
        from megatron_cpt.views.evaluation_table import render_evaluation

        render_evaluation(results, sys.stdout)
        if output is not None:
            print(f"written to {output}")


@contextlib.contextmanager
def evaluation_progress(*, is_main: bool, is_kept: bool) -> Iterator[Callable[[int, int], None]]:
    """Show the progress on rank 0, and how much was finished if the command is interrupted."""
    if not is_main:
        yield lambda amount, total: None
        return
    finished = 0

    def count(amount: int, total: int) -> None:
        nonlocal finished
        finished += amount
        advance(amount, total)

    try:
        with progress_bar("evaluating") as advance:
            yield count
    except KeyboardInterrupt:
        print(f"megatron-cpt: interrupted: {_what_is_kept(finished, is_kept)}", file=sys.stderr)
        raise


def _what_is_kept(finished: int, is_kept: bool) -> str:
    from megatron_cpt.config import format_number_of

    if not finished:
        return "no request was finished"
    verb = "is" if finished == 1 else "are"
    kept = "kept; run the same command again for the rest" if is_kept else "lost; --output FILE.json keeps them"
    return f"{format_number_of(finished, 'finished request')} {verb} {kept}"
