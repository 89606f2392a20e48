"""The thread that ends a process without progress."""

from __future__ import annotations

import subprocess
import sys
import threading
import time

from megatron_cpt.train.watchdog import Progress, Watchdog


def wait_for(condition, seconds=20.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


def test_progress_tells_what_and_since_when():
    clock = Clock()
    progress = Progress(clock)
    assert progress.phase == "start"
    clock.now = 5.0
    progress.note("step 1")
    clock.now = 7.5
    assert (progress.phase, progress.stalled_for()) == ("step 1", 2.5)


def test_it_barks_once_after_the_limit_and_not_before(tmp_path, capfd):
    clock, ends, looked = Clock(), [], threading.Event()
    progress = Progress(clock)
    progress.note("step 17")
    stalled_for = progress.stalled_for
    progress.stalled_for = lambda: (looked.set(), stalled_for())[1]
    watchdog = Watchdog(
        progress, 0.2, rank=2, folder=tmp_path, explain=lambda text: f"explained: {text}", end=ends.append
    )
    with watchdog:
        for now in (0.1, 0.2):
            clock.now = now
            looked.clear()
            assert looked.wait(20)
        assert ends == []
        clock.now = 0.3
        wait_for(lambda: ends)
        time.sleep(0.2)
    path = tmp_path / "rank-00002-step-17.txt"
    assert ends == [f"explained: no progress for over 0.2 s (resilience.hang_timeout); stacks in {path}"]
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
from megatron_cpt.train.watchdog import Progress, Watchdog
with Watchdog(Progress(), 0.3, rank=0, folder=pathlib.Path(sys.argv[1])):
    time.sleep(60)
"""
_HOLDS_THE_INTERPRETER = """
import ctypes, pathlib, sys
from megatron_cpt.train import watchdog
watchdog._BACKSTOP_SECONDS = 0.5
with watchdog.Watchdog(watchdog.Progress(), 1.0, rank=0, folder=pathlib.Path(sys.argv[1])):
    import time; time.sleep(0.5)
    ctypes.PyDLL(None).sleep(60)  # a call of C that no thread of Python gets past
"""


def _run(code, folder):
    started = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code, folder], capture_output=True, text=True, timeout=60, check=False)
    assert time.monotonic() - started < 30
    return done


def test_a_hanging_process_ends_with_1_and_one_clear_last_line(tmp_path):
    done = _run(_HANGS, tmp_path)
    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]
    assert last.startswith("megatron-cpt: error: no progress for over 0.3 s (resilience.hang_timeout); stacks in ")
    assert "line 5" in (tmp_path / "rank-00000-start.txt").read_text()


def test_a_process_stuck_in_c_code_ends_too(tmp_path):
    done = _run(_HOLDS_THE_INTERPRETER, tmp_path)
    assert done.returncode == 1
    assert "Timeout" in done.stderr
    assert "line 7" in done.stderr
