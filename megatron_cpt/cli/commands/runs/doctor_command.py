"""`megatron-cpt doctor`: check a node before a run."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TextIO

import typer

from megatron_cpt.cli.commands.runs.plan_command import OVERRIDES_HELP
from megatron_cpt.errors import EXIT_FAILURE, EXIT_OK

if TYPE_CHECKING:
    from megatron_cpt.doctor import Diagnosis

DEFAULT_PORT = 29400  # torchrun's default for the c10d rendezvous


def doctor(
    run: Annotated[
        Path | None, typer.Argument(metavar="[RUN.yaml]", help="Also check this run.", show_default=False)
    ] = None,
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[key=value ...]", help=OVERRIDES_HELP)] = None,
    port: Annotated[int, typer.Option("--port", help="Rendezvous port to check.")] = DEFAULT_PORT,
    as_json: Annotated[bool, typer.Option("--json", help="Print the findings as JSON.")] = False,
) -> None:
    """Check a node: software, GPUs, network, limits; with a run also its data, output folder and disk.

    Each finding comes with its cost and a fix. With several nodes, start one process per node under `launch`; the nodes
    are compared as well. Exit status: 0, or 1 if something keeps a run from starting.
    """
    from megatron_cpt.config.launcher import read_launcher
    from megatron_cpt.doctor import examine

    examination = examine(None if run is None else str(run), overrides or (), port=port)
    if read_launcher().rank == 0:
        if as_json:
            print(json.dumps(examination.to_dict(), indent=2))
        else:
            _render(examination.lines(), sys.stdout)
    raise typer.Exit(EXIT_FAILURE if examination.blocks else EXIT_OK)


def _render(diagnoses: Sequence[Diagnosis], out: TextIO) -> None:
    """Print a table of the checks, with cost and fix below each finding."""
    from rich.table import Table

    from megatron_cpt.views.terminal_console import TerminalConsole

    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column()
    for diagnosis in diagnoses:
        lines = [line for line in (diagnosis.found, diagnosis.cost, diagnosis.way_out) if line]
        table.add_row(diagnosis.level.value, diagnosis.check, "\n".join(lines))
    console = TerminalConsole(file=out, width=None if out.isatty() else 120)
    console.print(table)
    blocking = sum(diagnosis.level == "blocks" for diagnosis in diagnoses)
    warnings = sum(diagnosis.level == "warning" for diagnosis in diagnoses)
    console.print(f"\n{blocking} of {len(diagnoses)} checks block a run, {warnings} warn")
