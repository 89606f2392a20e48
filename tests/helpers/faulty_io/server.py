"""Process with the preloaded library and all imports done, which forks a child for each command of `megatron-cpt`.

A command takes a fraction of a second instead of the seconds that its imports take.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import json
import os
import pkgutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from tests.helpers.faulty_io import Control, Rule, build

_MOST_SECONDS = 180
_OUTPUTS = ("control.stdout", "control.stderr")


@dataclass(frozen=True)
class Outcome:
    """Exit status of a command (negative: the signal that killed it), its output, and the faults per rule."""

    status: int
    stdout: str
    stderr: str
    hits: list[int]


class FaultyCommands:
    """Runs commands under rules, in a `with` block.

    Args:
        folder: for the control file and the output.
        with_torch: also import what training and conversion need.
    """

    def __init__(self, folder: Path, *, with_torch: bool = False) -> None:
        self.control = Control(folder / "control")
        self._folder = folder
        self._arguments = [sys.executable, "-m", "tests.helpers.faulty_io.server", *["torch"] * with_torch]

    def __enter__(self) -> Self:
        environment = {**os.environ, "LD_PRELOAD": str(build()), "OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "0"}
        self._process = subprocess.Popen(
            self._arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, text=True
        )
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()

    def run(self, arguments: Sequence[str], rules: Sequence[Rule] = ()) -> Outcome:
        """Run one command in `folder`."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self.control.write(rules)
        wish = {"arguments": list(arguments), "control": str(self.control.path), "folder": str(self._folder)}
        self._process.stdin.write(json.dumps(wish) + "\n")
        self._process.stdin.flush()
        status = int(self._process.stdout.readline())
        stdout, stderr = (self.control.path.with_name(name).read_text(errors="replace") for name in _OUTPUTS)
        return Outcome(status, stdout, stderr, self.control.hits())


def _serve() -> None:
    if "torch" in sys.argv:
        importlib.import_module("tests.helpers.preload")
    import megatron_cpt

    roots = ("cli", "data", "files", "planning", "prepare") if "torch" not in sys.argv else ("",)
    for module in pkgutil.walk_packages(megatron_cpt.__path__, "megatron_cpt."):
        if module.name.startswith(tuple(f"megatron_cpt.{root}" for root in roots)) and "__main__" not in module.name:
            with contextlib.suppress(ImportError):  # of an extra
                importlib.import_module(module.name)
    for name in ("pyarrow.parquet", "rich.progress", "zstandard"):
        importlib.import_module(name)
    load = ctypes.CDLL(None).faulty_io_load
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        wish = json.loads(line)
        child = os.fork()
        if child == 0:
            _run(wish, load)
        answers.write(f"{os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])}\n")
        answers.flush()


def _run(wish: dict[str, Any], load: Any) -> None:
    status = 70
    try:
        signal.alarm(_MOST_SECONDS)
        os.chdir(wish["folder"])
        for name, descriptor in zip(_OUTPUTS, (1, 2), strict=True):
            os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644), descriptor)
        os.environ["FAULTY_IO"] = wish["control"]  # for processes that this one starts
        load(wish["control"].encode())
        from megatron_cpt.cli import main

        status = main(wish["arguments"])
    except BaseException:  # noqa: BLE001 - as the interpreter would show it
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


if __name__ == "__main__":
    _serve()
