"""Watchdog that ends a process without progress."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import time

from megatron_cpt.train.resilience.watchdog import Progress, Watchdog


def wait_for(condition, seconds=20.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_progress_tells_what_began_last_and_whether_it_is_new():
    progress = Progress()
    assert progress.phase == "start"
    progress.note("step 1")
    before = progress.count
    progress.note("step 1")
    assert progress.phase == "step 1"
    assert progress.count != before


def test_it_barks_once_after_the_limit_and_not_before(tmp_path, capfd):
    ends, progress = [], Progress()
    watchdog = Watchdog(progress, 0.4, rank=2, folder=tmp_path, end=ends.append)
    watchdog.explain = lambda text: f"explained: {text}"
    with watchdog:
        for _ in range(20):
            time.sleep(0.05)
            progress.note("step 17")
        assert ends == []
        wait_for(lambda: ends)
        time.sleep(0.2)
    path = tmp_path / "rank-00002-step-17.txt"
    assert ends == [f"explained: no progress for over 0.4 s (resilience.hang_timeout); stacks in {path}"]
    stacks = path.read_text()
    assert "test_it_barks_once_after_the_limit_and_not_before" in stacks, "the main thread's stack is in the file"
    assert "test_it_barks_once_after_the_limit_and_not_before" in capfd.readouterr().err, "and on stderr"


def test_without_a_limit_no_thread_runs(tmp_path):
    before = threading.active_count()
    with Watchdog(Progress(), None, rank=0, folder=tmp_path):
        assert threading.active_count() == before


def test_a_folder_that_cannot_be_written_does_not_keep_the_process_alive(tmp_path, capfd):
    blocked = tmp_path / "file"
    blocked.write_text("")
    ends = []
    with Watchdog(Progress(), 0.01, rank=0, folder=blocked / "stacks", end=ends.append):
        wait_for(lambda: ends)
    assert "Not a directory" in capfd.readouterr().err


_HANGS = """
import time, pathlib, sys
from megatron_cpt.train.resilience.watchdog import Progress, Watchdog
with Watchdog(Progress(), 0.3, rank=0, folder=pathlib.Path(sys.argv[1])):
    time.sleep(3600)
"""
_HOLDS_THE_INTERPRETER = """
import ctypes, pathlib, sys
from megatron_cpt.train.resilience import watchdog
watchdog._BACKSTOP_SECONDS = 0.5
with watchdog.Watchdog(watchdog.Progress(), 1.0, rank=0, folder=pathlib.Path(sys.argv[1])):
    import time; time.sleep(0.5)
    ctypes.PyDLL(None).sleep(3)  # a C call that keeps the interpreter lock
"""
_IS_SUSPENDED = """
import pathlib, sys, time
from megatron_cpt.train.resilience import watchdog
watchdog._BACKSTOP_SECONDS = 0.5
progress = watchdog.Progress()
with watchdog.Watchdog(progress, 2.0, rank=0, folder=pathlib.Path(sys.argv[1])):
    time.sleep(1.2)
    print("in the middle", flush=True)
    time.sleep(0.2)
    progress.note("step 2")
    time.sleep(1.0)
"""


def _run(code, folder):
    # a process that nothing ends sleeps for longer
    return subprocess.run(
        [sys.executable, "-c", code, folder], capture_output=True, text=True, timeout=600, check=False
    )


def test_a_hanging_process_ends_with_1_and_one_clear_last_line(tmp_path):
    done = _run(_HANGS, tmp_path)
    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]
    assert last.startswith("megatron-cpt: error: no progress for over 0.3 s (resilience.hang_timeout); stacks in ")
    assert "line 5" in (tmp_path / "rank-00000-start.txt").read_text()


def test_a_process_stuck_in_c_code_leaves_its_stacks(tmp_path):
    done = _run(_HOLDS_THE_INTERPRETER, tmp_path)
    assert "Timeout" in done.stderr
    assert "line 7" in done.stderr


def test_a_process_that_was_suspended_goes_on(tmp_path):
    command = [sys.executable, "-c", _IS_SUSPENDED, tmp_path]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "in the middle\n"
        process.send_signal(signal.SIGSTOP)
        time.sleep(5.0)  # longer than the limit and faulthandler's own timer
        process.send_signal(signal.SIGCONT)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    assert list(tmp_path.iterdir()) == []
