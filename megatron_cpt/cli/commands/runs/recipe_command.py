"""Command `recipe`: a run.yaml by the paper's rules for the user's own model and data."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from megatron_cpt.errors import UserError

CHECKPOINT_HELP = "A Hugging Face folder, a Megatron checkpoint, a checkpoint, or a run directory (its newest)."
GENERAL_HELP = "Pretraining sources: a name and a prefix of .bin/.idx, or a glob. A repeated name adds a prefix."
QA_HELP = "Sources of questions and answers, in the same form."
QUALITY_HELP = "Tokens of this general source count FACTOR times in its weight."
HELD_OUT_HELP = "Held-out data of a source, on which its loss is measured."
SPLIT_HELP = "Hold this share of the documents out of each source without --held-out: 0.1%."
SPLIT_DIR_HELP = "Folder of the data that --split writes. [default: split, beside the output]"
AREA_HELP = "The QA source that teaches what a task of the evaluation measures: mmlu_stem=qa_stem."
MAX_LR_HELP = "Learning rate that pretraining ended on. [default: as the checkpoint records it]"
PROPOSE_HELP = "Propose this rate from the size of the model, if it is not recorded."
CHECKPOINT_DIR_HELP = "Checkpoint to import a Hugging Face or Megatron one to. [default: checkpoints/NAME]"
MODEL_HELP = "Model of a Megatron checkpoint that stores no config: a preset, or a YAML file with a model section."


def recipe(
    checkpoint: Annotated[Path, typer.Argument(metavar="CHECKPOINT", help=CHECKPOINT_HELP, show_default=False)],
    general: Annotated[list[str], typer.Option("--general", metavar="NAME=PREFIX ...", help=GENERAL_HELP)],
    qa: Annotated[list[str], typer.Option("--qa", metavar="NAME=PREFIX ...", help=QA_HELP)],
    tokens: Annotated[str, typer.Option("--tokens", metavar="N", help="Length of the run: 100B.")],
    quality: Annotated[
        list[str] | None, typer.Option("--quality", metavar="NAME=FACTOR ...", help=QUALITY_HELP)
    ] = None,
    held_out: Annotated[
        list[str] | None, typer.Option("--held-out", metavar="NAME=PREFIX ...", help=HELD_OUT_HELP)
    ] = None,
    split: Annotated[str | None, typer.Option("--split", metavar="SHARE", help=SPLIT_HELP)] = None,
    split_dir: Annotated[Path | None, typer.Option("--split-dir", metavar="DIR", help=SPLIT_DIR_HELP)] = None,
    evaluation: Annotated[
        Path | None,
        typer.Option("--evaluation", metavar="results.json", help="Result of `evaluate` on the checkpoint."),
    ] = None,
    area: Annotated[list[str] | None, typer.Option("--area", metavar="TASK=SOURCE ...", help=AREA_HELP)] = None,
    max_lr: Annotated[float | None, typer.Option("--max-lr", metavar="RATE", help=MAX_LR_HELP)] = None,
    propose_lr: Annotated[bool, typer.Option("--propose-lr", help=PROPOSE_HELP)] = False,
    seq_length: Annotated[
        int | None, typer.Option("--seq-length", metavar="N", min=1, help="Tokens per sequence. [default: recorded]")
    ] = None,
    global_batch: Annotated[
        int | None, typer.Option("--global-batch", metavar="N", min=1, help="Sequences per step. [default: recorded]")
    ] = None,
    gpus: Annotated[int | None, typer.Option("--gpus", metavar="N", min=1, help="Number of GPUs.")] = None,
    gpu: Annotated[
        str | None, typer.Option("--gpu", metavar="NAME", help="Type of the GPUs: a100, h100, h200, b200.")
    ] = None,
    checkpoint_dir: Annotated[
        Path | None, typer.Option("--checkpoint-dir", metavar="DIR", help=CHECKPOINT_DIR_HELP)
    ] = None,
    tokenizer: Annotated[
        str | None, typer.Option("--tokenizer", metavar="KIND:PATH", help="Tokenizer. [default: the checkpoint's]")
    ] = None,
    model: Annotated[str | None, typer.Option("--model", metavar="NAME|FILE", help=MODEL_HELP)] = None,
    allow_pickle: Annotated[bool, typer.Option("--allow-pickle", help="Accept pickled .bin weights.")] = False,
    output: Annotated[Path, typer.Option("--output", metavar="RUN.yaml", help="The file to write.")] = Path("run.yaml"),
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing run.yaml.")] = False,
) -> None:
    """Write a run.yaml for your model and data by the rules of the paper, each value with its reason.

    The run starts at the learning rate that pretraining ended on, and switches from the general blend to one with 10 %
    of questions and answers at a fifth of it. Prints the plan; if the planner refuses the run, nothing is written.
    """
    if (gpus is None) != (gpu is None):
        raise typer.BadParameter("give both --gpus N and --gpu NAME", param_hint="--gpus/--gpu")
    from megatron_cpt.cli.progress import progress_bar
    from megatron_cpt.recipe.write_recipe import RecipeOptions, write_recipe
    from megatron_cpt.views.advice_table import render_cluster
    from megatron_cpt.views.plan_table import render_plan

    options = RecipeOptions(
        general=general,
        qa=qa,
        tokens=_count(tokens),
        quality=quality or (),
        held_out=held_out or (),
        split=None if split is None else _share(split),
        split_folder=split_dir,
        evaluation=evaluation,
        areas=area or (),
        max_lr=max_lr,
        propose_lr=propose_lr,
        seq_length=seq_length,
        global_batch=global_batch,
        num_gpus=gpus,
        gpu=gpu,
        import_to=checkpoint_dir,
        model=model,
        allow_pickle=allow_pickle,
        tokenizer=tokenizer,
    )
    with progress_bar("splitting", None, is_bytes=True) as advance:
        written = write_recipe(checkpoint, output, options, overwrite=overwrite, progress=advance)
    render_plan(written.plan, sys.stdout)
    if written.cluster is not None:
        render_cluster(written.cluster, sys.stdout)
    print(f"\n{output}: written; each value has its reason beside or above it")
    if written.import_command is not None:
        print(f"before training, import the checkpoint: {written.import_command}")


def _count(text: str) -> int:
    from megatron_cpt.config import parse_count

    try:
        count = parse_count(text)
    except ValueError as error:
        raise UserError(f"--tokens {text}: {error}") from error
    if not count:
        raise UserError(f"--tokens {text}: give at least one step, such as 100B")
    return count


def _share(text: str) -> float:
    """Return `0.1%` or `0.001` as a share."""
    number = text.removesuffix("%")
    try:
        return float(number) / (100 if number != text else 1)
    except ValueError as error:
        raise UserError(f"--split {text}: give a share of the documents, such as 0.1% or 0.001") from error
