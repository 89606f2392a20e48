"""`megatron-cpt launch`: torchrun for a run, with exit statuses and signals that get through."""

from __future__ import annotations

import os
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from megatron_cpt.cli.missing_package import require_module
from megatron_cpt.errors import UserError

COMMANDS = ("train", "doctor")


class WordsCommand(TyperCommand):
    """A command whose words, `--` among them, reach it as they are."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Take all words as arguments, unless help is asked for before `--`."""
        before = args[: args.index("--")] if "--" in args else args
        return super().parse_args(ctx, args if not args or "--help" in before else ["--", *args])


def launch(
    words: Annotated[list[str], typer.Argument(metavar="[torchrun options] -- train RUN.yaml ...")],
) -> None:
    """Run a command on every rank of this node under torchrun, once on each node.

    torchrun's options stand before --, the command after it: `launch --nproc-per-node 8 --max-restarts 3 -- train
    RUN.yaml`. SIGTERM and SIGUSR1 reach the ranks, which save and end; faults are restarted, mistakes are not. Exit
    status: the ranks' own: 0, 75 (stopped after saving: start it again), 2, 3, else 1.
    """
    require_module("torch")  # before torchrun, which would fail in a process of its own
    from megatron_cpt.launch import check_options, supervise, with_defaults

    at = words.index("--") if "--" in words else len(words)
    options, command = words[:at], words[at + 1 :]
    if not command or command[0] not in COMMANDS:
        raise UserError(f"launch: give the command after --: launch {' '.join(options)} -- train RUN.yaml ...")
    check_options(options)
    raise typer.Exit(supervise(with_defaults(options, os.environ), command))
