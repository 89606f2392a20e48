"""`megatron-cpt teach`: the cache of a teacher for distillation."""

from __future__ import annotations

import contextlib
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from megatron_cpt.cli.commands.checkpoints.generate_command import CHECKPOINT_HELP, LAYOUT_HELP
from megatron_cpt.errors import EXIT_STOPPED

if TYPE_CHECKING:
    from collections.abc import Iterator

    from megatron_cpt.teach.make_cache import Advance

RUN_HELP = "The run that will be trained; its files, document rules and longest sequence count."
OUTPUT_HELP = "Folder of the cache; unfinished work is in OUTPUT.partial."
WINDOW_HELP = "Tokens that the teacher reads at once. [default: the longest sequence of the run]"
STRIDE_HELP = "Distance of the starts of two windows. [default: half of the window]"
SOURCE_HELP = "Source to teach; repeatable. [default: those with a teacher in the run]"


def teach(
    checkpoint: Annotated[Path, typer.Argument(metavar="CKPT_OR_RUN", help=CHECKPOINT_HELP, show_default=False)],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[key=value ...]", help=LAYOUT_HELP)] = None,
    run: Annotated[Path, typer.Option("--run", metavar="RUN.yaml", help=RUN_HELP, show_default=False)] = ...,  # type: ignore[assignment]
    output: Annotated[Path, typer.Option("--output", metavar="CACHE", help=OUTPUT_HELP, show_default=False)] = ...,  # type: ignore[assignment]
    top_k: Annotated[int, typer.Option("--top-k", metavar="K", help="Most likely tokens per record.")] = 64,
    window: Annotated[int | None, typer.Option("--window", metavar="N", help=WINDOW_HELP)] = None,
    stride: Annotated[int | None, typer.Option("--stride", metavar="N", help=STRIDE_HELP)] = None,
    source: Annotated[list[str] | None, typer.Option("--source", metavar="NAME", help=SOURCE_HELP)] = None,
    plan: Annotated[bool, typer.Option("--plan", help="Print size and work, and write nothing.")] = False,
    restart: Annotated[bool, typer.Option("--restart", help="Discard earlier progress, start from scratch.")] = False,
) -> None:
    """Store a teacher's most likely next tokens for every position of a run's sources, for distillation.

    Without a launcher it is one process; under torchrun, one rank of many. Run the same command again to resume it.
    """
    from megatron_cpt.launch.environment import set_cuda_variables

    warnings.simplefilter("ignore")  # torch's and megatron-core's, of what is not installed
    set_cuda_variables()  # before torch is imported, which reads them
    from megatron_cpt.config import format_bytes, format_count
    from megatron_cpt.config.launcher import read_launcher
    from megatron_cpt.prepare import prepare_run
    from megatron_cpt.teach.cache_plan import TeachOptions
    from megatron_cpt.teach.make_cache import make_cache, plan_teacher

    options = TeachOptions(top_k, window, stride, tuple(source or ()), tuple(overrides or ()), restart)
    prepared = prepare_run(run, need_files=False)
    if plan:
        print(f"{output}: {plan_teacher(checkpoint, prepared, options).describe()}")
        return
    is_main = read_launcher().rank == 0
    with _progress() if is_main else contextlib.nullcontext(lambda done, total: None) as advance:
        report = make_cache(checkpoint, prepared, output, options, notify=_print_note, advance=advance)
    if not is_main:
        raise typer.Exit(0 if report.is_finished else EXIT_STOPPED)
    if not report.is_finished:
        _print_note(f"stopped; finished parts are kept in {output}.partial; run the same command again to resume")
        raise typer.Exit(EXIT_STOPPED)
    new, seconds = report.new_records, max(report.seconds, 1e-9)
    work = (
        f"{format_count(new)} new in {seconds:.1f} s ({format_count(new / seconds)} tokens/s)" if new else "no new ones"
    )
    header = report.header
    print(f"{output}: {format_count(header.num_positions)} records, {format_bytes(header.num_bytes)}; {work}")
    print(f"train with it: teacher: {{cache: {output}, weight: 0.5}}")


def _print_note(text: str) -> None:
    print(text, file=sys.stderr)


@contextlib.contextmanager
def _progress() -> Iterator[Advance]:
    """Show a bar with tokens per second and the time left on stderr, if stderr is a terminal."""
    from megatron_cpt.cli.progress import Rates, described_progress
    from megatron_cpt.config import format_count

    rates = Rates()
    with described_progress() as (show, _):

        def advance(done: int, total: int) -> None:
            (speed,) = rates.since_first(done)
            show(done, total, f"{format_count(done)} of {format_count(total)} tokens, {format_count(speed)} tokens/s")

        yield advance
