"""Stop signals of a process that belongs to one run."""

from __future__ import annotations

import os
import signal
import subprocess
from typing import Any

import pytest

from megatron_cpt.backend.signals import own_process, stops_as_interrupts
from tests.helpers.command import run_forked


def _case(names: list[str], before: Any) -> None:
    signal.signal(signal.SIGINT, before)
    with own_process() as request:
        for name in names:
            signal.raise_signal(getattr(signal, name))
            print(name, request.received and request.received.name, flush=True)
    print(signal.getsignal(signal.SIGINT) is before)


def _case_without_a_reader(names: list[str]) -> None:
    read, write = os.pipe()
    os.close(read)
    os.dup2(write, 2)
    _case(names, signal.default_int_handler)


def _raise_signals(*names: str, before: Any = signal.default_int_handler) -> subprocess.CompletedProcess[str]:
    """Raise signals in a process of its own, whose disposition of SIGINT does not depend on how the tests began."""
    return run_forked(_case, [*names], before)


def test_ctrl_c_is_recorded_and_said_at_once() -> None:
    done = _raise_signals("SIGINT")
    assert (done.returncode, done.stdout) == (0, "SIGINT SIGINT\nTrue\n")
    assert "received SIGINT: saving after this step; press Ctrl-C again to end without saving" in done.stderr


def test_a_second_ctrl_c_ends_the_process_at_once() -> None:
    done = _raise_signals("SIGINT", "SIGINT")
    assert (done.returncode, done.stdout) == (-signal.SIGINT, "SIGINT SIGINT\n")  # a shell reports 130


def test_a_second_sigterm_does_not_interrupt_the_save() -> None:
    done = _raise_signals("SIGTERM", "SIGTERM")
    assert (done.returncode, done.stdout) == (0, "SIGTERM SIGTERM\nSIGTERM SIGTERM\nTrue\n")


def test_a_background_job_still_ignores_ctrl_c() -> None:
    done = _raise_signals("SIGINT", before=signal.SIG_IGN)
    assert (done.returncode, done.stdout) == (0, "SIGINT None\nTrue\n")


def test_ctrl_c_is_recorded_if_nobody_reads_stderr() -> None:
    done = run_forked(_case_without_a_reader, ["SIGINT"])
    assert (done.returncode, done.stdout) == (0, "SIGINT SIGINT\nTrue\n")


def _case_of_an_interrupt(name: str, raises: bool) -> None:
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):  # the tests themselves may run under nohup
        signal.signal(number, signal.SIG_DFL)
    try:
        with stops_as_interrupts():
            try:
                signal.raise_signal(getattr(signal, name))
            finally:
                signal.raise_signal(signal.SIGTERM)
                print("cleaned up", flush=True)
                if raises:
                    raise RuntimeError("connection closed by peer")
    except KeyboardInterrupt as error:
        print("interrupted", error.__suppress_context__)
    print(signal.getsignal(signal.SIGTERM) is signal.SIG_DFL)


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGHUP"])
@pytest.mark.parametrize("raises", [False, True])
def test_a_stop_signal_interrupts_and_the_next_ones_wait_for_the_clean_up(name: str, raises: bool) -> None:
    done = run_forked(_case_of_an_interrupt, name, raises)
    assert done.stdout == "cleaned up\ninterrupted True\nTrue\n", done.stderr


def test_an_error_without_a_signal_stays_itself() -> None:
    with pytest.raises(RuntimeError, match="fault"), stops_as_interrupts():
        raise RuntimeError("fault")
