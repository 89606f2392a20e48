"""The command line: `megatron-cpt` and `python -m megatron_cpt`.

Each command has a module of its own, which imports what it needs when the command runs. So `--help` takes 0.2 s, and
`plan` does not load torch.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Annotated

import typer

from megatron_cpt import __version__
from megatron_cpt.cli.arguments import repeat_options
from megatron_cpt.cli.command_groups import CHECKPOINTS, DATA, EVALUATE, OPERATIONS, PLAN, TRAIN, GroupedCommands
from megatron_cpt.cli.commands.checkpoints.average_command import average
from megatron_cpt.cli.commands.checkpoints.convert_command import app as convert_app
from megatron_cpt.cli.commands.checkpoints.evaluate_command import evaluate
from megatron_cpt.cli.commands.checkpoints.generate_command import generate
from megatron_cpt.cli.commands.checkpoints.grow_command import grow
from megatron_cpt.cli.commands.checkpoints.teach_command import teach
from megatron_cpt.cli.commands.data.check_command import check
from megatron_cpt.cli.commands.data.inspect_command import inspect
from megatron_cpt.cli.commands.data.merge_command import merge
from megatron_cpt.cli.commands.data.mine_command import mine
from megatron_cpt.cli.commands.data.overlap_command import overlap
from megatron_cpt.cli.commands.data.preprocess_command import preprocess
from megatron_cpt.cli.commands.data.split_command import split
from megatron_cpt.cli.commands.data.trace_command import trace
from megatron_cpt.cli.commands.runs.doctor_command import doctor
from megatron_cpt.cli.commands.runs.experiment_command import experiment
from megatron_cpt.cli.commands.runs.fit_command import fit
from megatron_cpt.cli.commands.runs.launch_command import WordsCommand, launch
from megatron_cpt.cli.commands.runs.plan_command import plan
from megatron_cpt.cli.commands.runs.recipe_command import recipe
from megatron_cpt.cli.commands.runs.report_command import report
from megatron_cpt.cli.commands.runs.train_command import train
from megatron_cpt.cli.missing_package import describe_missing_package
from megatron_cpt.errors import EXIT_FAILURE, EXIT_USER, CptError
from megatron_cpt.files.terminal import escaped_output

__all__ = ["app", "main"]

app = typer.Typer(
    name="megatron-cpt",
    cls=GroupedCommands,
    help="Continued pretraining on megatron-core: plan a run, prepare its data, train it.",
    no_args_is_help=True,
    rich_markup_mode=None,  # plain text: rich takes brackets in a path for markup
    pretty_exceptions_enable=False,
)
app.command(rich_help_panel=PLAN)(plan)
app.command(rich_help_panel=PLAN)(fit)
app.command(rich_help_panel=PLAN)(recipe)
for command in (preprocess, check, inspect, merge, split, overlap, mine, trace):
    app.command(rich_help_panel=DATA)(command)
app.command(rich_help_panel=TRAIN)(train)
app.command(rich_help_panel=TRAIN, cls=WordsCommand)(launch)
app.command(rich_help_panel=TRAIN)(report)
app.command(rich_help_panel=TRAIN)(experiment)
app.add_typer(convert_app, rich_help_panel=CHECKPOINTS)
app.command(rich_help_panel=CHECKPOINTS)(average)
app.command(rich_help_panel=CHECKPOINTS)(grow)
app.command(rich_help_panel=CHECKPOINTS)(teach)
app.command(rich_help_panel=EVALUATE)(evaluate)
app.command(rich_help_panel=EVALUATE)(generate)
app.command(rich_help_panel=OPERATIONS)(doctor)


def _print_version(is_wanted: bool) -> None:
    if is_wanted:
        print(f"megatron-cpt {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Declare the options that come before a command."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: arguments of the command line; None: `sys.argv[1:]`.

    Returns:
        The exit status, see `megatron_cpt.errors`. An unexpected exception is not caught and keeps its traceback.
    """
    with escaped_output():
        return _run(list(sys.argv[1:] if argv is None else argv))


def _run(arguments: list[str]) -> int:
    try:
        app(args=repeat_options(arguments), prog_name="megatron-cpt")
    except CptError as error:
        print(f"megatron-cpt: error: {error}", file=sys.stderr)
        return error.exit_status
    except ModuleNotFoundError as error:
        advice = describe_missing_package(error)
        if advice is None:
            raise
        print(f"megatron-cpt {_name(arguments)}: {advice}", file=sys.stderr)
        return EXIT_USER
    except OSError as error:
        if error.errno is None:
            raise
        place = f"{error.filename}: " if error.filename else ""
        print(f"megatron-cpt: error: {place}{error.strerror}", file=sys.stderr)
        return EXIT_FAILURE
    except MemoryError:
        print(f"megatron-cpt: error: out of memory; give {_name(arguments)} more, or a smaller input", file=sys.stderr)
        return EXIT_FAILURE
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else 0
    return 0


def _name(arguments: Sequence[str]) -> str:
    return arguments[0] if arguments else "the command"
