"""`megatron-cpt launch`: torchrun that passes on exit statuses and signals."""

from __future__ import annotations

import os
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from megatron_cpt.cli.missing_package import require_module
from megatron_cpt.errors import UserError

COMMANDS = ("train", "evaluate", "generate", "doctor")


class WordsCommand(TyperCommand):
    """Command that receives all its words unparsed, including `--`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Treat all words as arguments, except `--help` before `--`."""
        before = args[: args.index("--")] if "--" in args else args
        return super().parse_args(ctx, args if not args or "--help" in before else ["--", *args])


def launch(
    words: Annotated[list[str], typer.Argument(metavar="[torchrun options] -- train RUN.yaml ...")],
) -> None:
    """Run a command on every rank of this node under torchrun; start it once per node.

    Give torchrun's options before -- and the command after it: `launch --nproc-per-node 8 --max-restarts 3 -- train
    RUN.yaml`. On SIGTERM, SIGUSR1 or Ctrl-C the ranks save a checkpoint and end. If a rank fails, all ranks are
    restarted, up to --max-restarts times. Exit status of the ranks: 0; 75: stopped after saving, start again to resume;
    2 or 3: an error message; 1: failure; 130: a second Ctrl-C.
    """
    require_module("torch")  # before torchrun, which would fail in a process of its own
    from megatron_cpt.launch import check_options, check_port, supervise, with_defaults

    split = words.index("--") if "--" in words else len(words)
    options, command = words[:split], words[split + 1 :]
    if not command or command[0] not in COMMANDS:
        raise UserError(f"launch: give the command after --: launch {' '.join(options)} -- train RUN.yaml ...")
    check_options(options)
    check_port(options)
    raise typer.Exit(supervise(with_defaults(options, os.environ), command))
