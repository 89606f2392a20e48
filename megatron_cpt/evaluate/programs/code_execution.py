"""Run programs that a model has written, in a sandbox, and only if the user allows it.

A program gets a process of its own with limits on CPU time, memory, file size, processes and descriptors, an empty
environment, and a wall-clock limit for everything it starts. Namespaces, if the kernel allows them, hide the rest of
the machine: no network, no other processes, and a file system with nothing but Python, read-only, and an empty folder
in memory. Elsewhere an audit hook of Python stands in; `Outcome.isolation` names which of the two it was.

The sandbox does not protect against a bug of the kernel, and the audit hook not against a program that was written to
get around it. Time, caches and CPU are shared with the machine. A program can also claim to have passed its tests.
"""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path

from megatron_cpt.errors import UserError

CHILD = Path(__file__).with_name("sandbox_child.py")
MAX_REPORT_BYTES = 4096
TIMED_OUT = b"stopped by the wall-clock limit\n"

_allowed: ContextVar[bool] = ContextVar("code_execution_allowed", default=False)


@dataclass(frozen=True)
class Outcome:
    """End of a program.

    Attributes:
        passed: the program ran to its last line.
        reason: the exception, the signal, or the limit that ended it; empty if it passed.
        isolation: `namespaces`, or `audit hook` where the kernel refuses namespaces.
    """

    passed: bool
    reason: str
    isolation: str


@contextmanager
def allow_code_execution() -> Iterator[None]:
    """Allow programs inside the block; `megatron-cpt evaluate --allow-code-execution` enters it."""
    token = _allowed.set(True)
    try:
        yield
    finally:
        _allowed.reset(token)


def require_permission() -> None:
    """Raise UserError unless the user has allowed code execution."""
    if not _allowed.get():
        raise UserError(
            "this task runs programs that the model has written; it needs --allow-code-execution. They run in a "
            "sandbox, but use a machine or a container that you can lose"
        )


def run_program(
    source: str,
    *,
    cpu_seconds: int = 10,
    wall_seconds: float = 20,
    memory_bytes: int = 512 << 20,
    file_bytes: int = 1 << 20,
    processes: int = 8,
    try_namespaces: bool = True,
) -> Outcome:
    """Run Python source code in the sandbox; only the standard library can be imported.

    Args:
        source: program; it passes if its last line is reached.
        cpu_seconds: limit per process.
        wall_seconds: limit after which everything the program has started is killed.
        memory_bytes: limit of the address space per process, and of all files in memory together.
        file_bytes: limit per file.
        processes: limit on processes and threads. With the audit hook, a program can start none.
        try_namespaces: False uses the audit hook also where the kernel allows namespaces.

    Raises:
        UserError: the user has not allowed code execution.
    """
    require_permission()
    reader, writer = os.pipe()
    limits = {"cpu": cpu_seconds, "memory": memory_bytes, "file": file_bytes, "processes": processes}
    options = json.dumps({**limits, "report": writer, "try_namespaces": try_namespaces})
    with tempfile.TemporaryDirectory(prefix="megatron-cpt-program.") as folder, os.fdopen(reader, "rb") as reports:
        try:
            # -I and -S: no variables, no user site, no packages, no current folder on the path.
            child = subprocess.Popen(
                [sys.executable, "-I", "-S", str(CHILD), options],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                env={},
                cwd=folder,
                start_new_session=True,
                pass_fds=(writer,),
            )
        finally:
            os.close(writer)
        try:
            with suppress(BrokenPipeError):
                assert child.stdin is not None
                child.stdin.write(source.encode())
                child.stdin.close()
            report = read_report(reports.fileno(), time.monotonic() + wall_seconds)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
            status = child.wait()
    return outcome_of(report, status)


def available_isolation() -> str:
    """Return the isolation that programs get on this machine, see `Outcome`.

    Raises:
        UserError: not even an empty program runs here.
    """
    with allow_code_execution():
        outcome = run_program("pass")
    if not outcome.passed:
        raise UserError(
            f"programs cannot run in the sandbox on this machine: an empty one {outcome.reason}; remove the tasks that "
            "run programs"
        )
    return outcome.isolation


def read_report(descriptor: int, deadline: float) -> bytes:
    """Return what the child reports before it ends or the deadline comes."""
    report = b""
    while len(report) < MAX_REPORT_BYTES:
        ready, _, _ = select.select([descriptor], [], [], max(0.0, deadline - time.monotonic()))
        if not ready:
            return report + TIMED_OUT
        piece = os.read(descriptor, MAX_REPORT_BYTES - len(report))
        if not piece:
            break
        report += piece
    return report


def outcome_of(report: bytes, status: int) -> Outcome:
    """Return the outcome that the lines of a report describe: isolation, then the result, unless the child was killed.

    Args:
        report: what the child has written.
        status: return code of the child, negative for a signal.
    """
    isolation, result = [*report.decode(errors="replace").splitlines(), "", ""][:2]
    if not result:
        result = f"ended by {signal.Signals(-status).name}" if status < 0 else "ended before its last line"
    return Outcome(passed=result == "passed", reason="" if result == "passed" else result, isolation=isolation)
