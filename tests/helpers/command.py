"""Programs in processes forked from the server of `ranks`, such as `megatron-cpt` as a user starts it.

A new interpreter imports torch and megatron-core for about four seconds of one core; a forked process has both.
Arguments, working directory, environment, output, signals and exit status are as in a new process.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from tests.helpers.ranks import context

Prepare = Callable[[], None]
"""Called in the new process before the command runs; must be picklable."""


def start_command(arguments: Sequence[object], *, stdout: Path, stderr: Path) -> Any:
    """Start `megatron-cpt ARGUMENTS`, whose output goes to files or pipes, and return its process."""
    process = context.Process(
        target=_run, args=((str(stdout), str(stderr)), _command, (None, {}, None, [*map(str, arguments)]))
    )
    process.start()
    return process


def run_command(
    arguments: Sequence[object],
    *,
    folder: Path | None = None,
    environment: Mapping[str, str] | None = None,
    prepare: Prepare | None = None,
) -> subprocess.CompletedProcess[str]:
    """Run `megatron-cpt ARGUMENTS` and return its status and output.

    Args:
        arguments: of the command, without its name.
        folder: working directory; default: the tests' directory.
        environment: additional variables.
        prepare: see `Prepare`.
    """
    return run_forked(_command, folder, dict(environment or {}), prepare, [*map(str, arguments)])


def run_forked(
    function: Callable[..., int | None], *args: object, timeout: float = 600.0
) -> subprocess.CompletedProcess[str]:
    """Call a module-level function in a new process; return its result as the status, and its output.

    Raises:
        TimeoutError: the process was still running after `timeout` seconds; it is killed.
    """
    with TemporaryDirectory() as name:
        streams = [str(Path(name) / stream) for stream in ("stdout", "stderr")]
        process = context.Process(target=_run, args=(streams, function, args))
        process.start()
        process.join(timeout)
        if process.exitcode is None:
            process.kill()
            process.join()
            raise TimeoutError(f"{function.__name__}{args} was still running after {timeout} s")
        out, err = (Path(stream).read_text(errors="replace") for stream in streams)
        return subprocess.CompletedProcess([function.__name__, *map(str, args)], process.exitcode, out, err)


def _run(streams: Sequence[str], function: Callable[..., int | None], args: tuple[object, ...]) -> None:
    for number, path in enumerate(streams, start=1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND), number)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a process started in the background ignores it
    import torch

    torch.set_num_threads(1)
    sys.exit(function(*args))


def _command(folder: Path | None, environment: Mapping[str, str], prepare: Prepare | None, arguments: list[str]) -> int:
    from megatron_cpt.cli import main

    if folder is not None:
        os.chdir(folder)
    os.environ.update(environment)
    if prepare is not None:
        prepare()
    sys.argv = ["megatron-cpt", *arguments]
    return main(arguments)
