"""The command line: `megatron-cpt` and `python -m megatron_cpt`.

One module a command; each imports what it needs when it runs, so `--help` and `plan` never load torch.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Annotated

import typer

from megatron_cpt import __version__
from megatron_cpt.cli.arguments import repeat_options
from megatron_cpt.cli.check_command import check
from megatron_cpt.cli.convert_command import app as convert_app
from megatron_cpt.cli.doctor_command import doctor
from megatron_cpt.cli.inspect_command import inspect
from megatron_cpt.cli.launch_command import WordsCommand, launch
from megatron_cpt.cli.merge_command import merge
from megatron_cpt.cli.overlap_command import overlap
from megatron_cpt.cli.plan_command import plan
from megatron_cpt.cli.preprocess_command import preprocess
from megatron_cpt.cli.split_command import split
from megatron_cpt.cli.trace_command import trace
from megatron_cpt.cli.train_command import train
from megatron_cpt.errors import CptError

__all__ = ["app", "main"]

app = typer.Typer(
    name="megatron-cpt",
    help="Continued pretraining on megatron-core: plan a run, prepare its data, train it.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,  # help and usage errors as plain text: brackets in a path stay brackets
    pretty_exceptions_enable=False,
)
app.command()(plan)
app.command()(train)
app.command(cls=WordsCommand)(launch)
app.command()(doctor)
app.command()(preprocess)
app.command()(check)
app.command()(inspect)
app.command()(merge)
app.command()(split)
app.command()(overlap)
app.command()(trace)
app.add_typer(convert_app)


def _version(wanted: bool) -> None:
    if wanted:
        print(f"megatron-cpt {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Options that stand before a command."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: its arguments; left out: those of the process.

    Returns:
        The exit status: see `megatron_cpt.errors`. A defect of ours is not caught and keeps its traceback.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        app(args=repeat_options(arguments), prog_name="megatron-cpt")
    except CptError as error:
        print(f"megatron-cpt: error: {error}", file=sys.stderr)
        return error.exit_status
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else 0
    return 0
