"""Hostile programs in the sandbox, with namespaces and with the audit hook that stands in for them."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_cpt.errors import EXIT_USER, UserError
from megatron_cpt.evaluate.programs import code_execution
from megatron_cpt.evaluate.programs.code_execution import Outcome, allow_code_execution, run_program

BOTH = pytest.mark.parametrize("try_namespaces", [True, False], ids=["namespaces", "audit hook"])


def run(source: str, try_namespaces: bool = True, **limits) -> Outcome:
    with allow_code_execution():
        return run_program(source, try_namespaces=try_namespaces, **{"wall_seconds": 300, **limits})


@pytest.fixture
def namespaces() -> None:
    if run("pass").isolation != "namespaces":
        pytest.skip("the kernel refuses namespaces")


def test_nothing_runs_without_permission(monkeypatch):
    monkeypatch.setattr(subprocess, "Popen", lambda *args, **kwargs: pytest.fail("a process was started"))
    with pytest.raises(UserError, match="needs --allow-code-execution") as caught:
        run_program("pass")
    assert caught.value.exit_status == EXIT_USER


def test_permission_ends_with_its_block():
    with allow_code_execution():
        code_execution.require_permission()
    with pytest.raises(UserError):
        code_execution.require_permission()


@BOTH
def test_a_program_passes_only_if_its_last_line_is_reached(try_namespaces):
    imports = "import collections, dataclasses, hashlib, json, math, random, re, sqlite3, typing"
    assert run(f"{imports}\nassert math.sqrt(4) == 2", try_namespaces).passed
    assert run("assert 1 == 2, 'no'", try_namespaces).reason == "AssertionError: no"
    assert run("def f(:", try_namespaces).reason.startswith("SyntaxError")
    for ending in ("import sys; sys.exit(0)", "import os; os._exit(0)"):
        outcome = run(ending, try_namespaces)
        assert (outcome.passed, outcome.reason) == (False, "ended before its last line")


@BOTH
def test_an_infinite_loop_ends(try_namespaces):
    # On a busy machine the wall clock may come first.
    outcome = run("while True: pass", try_namespaces, cpu_seconds=1, wall_seconds=20)
    assert outcome.reason in ("ended by SIGXCPU", "stopped by the wall-clock limit")


@BOTH
def test_a_program_that_waits_is_stopped(try_namespaces):
    outcome = run("import time; time.sleep(1000)", try_namespaces, wall_seconds=2)
    assert (outcome.passed, outcome.reason) == (False, "stopped by the wall-clock limit")


@BOTH
def test_memory_is_limited(try_namespaces):
    assert run("bytearray(10**10)", try_namespaces).reason.startswith("MemoryError")
    assert run("all = [bytearray(10**6) for _ in range(10**4)]", try_namespaces).reason.startswith("MemoryError")


@BOTH
def test_a_fork_bomb_cannot_start(try_namespaces):
    outcome = run("import os\nwhile True: os.fork()", try_namespaces, cpu_seconds=2)
    assert outcome.reason.startswith(("BlockingIOError", "PermissionError"))


@BOTH
def test_nothing_can_be_written_outside(try_namespaces, tmp_path):
    tmp_path.chmod(0o777)
    target = tmp_path / "escaped"
    assert not run(f"open({str(target)!r}, 'w').write('x')", try_namespaces).passed
    assert not run(f"import os; os.mkdir({str(target)!r})", try_namespaces).passed
    assert list(tmp_path.iterdir()) == []
    assert run("open('inside', 'w').write('x'); assert open('inside').read() == 'x'", try_namespaces).passed


@BOTH
def test_files_are_not_deleted(try_namespaces, tmp_path):
    victim = tmp_path / "victim"
    victim.write_text("precious")
    tmp_path.chmod(0o777)
    victim.chmod(0o666)
    source = f"""
import os, shutil
for action in (os.unlink, os.rmdir, shutil.rmtree, lambda path: os.truncate(path, 0)):
    for path in ({str(victim)!r}, {str(tmp_path)!r}):
        try:
            action(path)
        except OSError:
            pass
"""
    assert run(source, try_namespaces).passed
    assert victim.read_text() == "precious"


@BOTH
def test_the_environment_and_files_of_the_user_are_not_seen(try_namespaces, tmp_path, monkeypatch):
    monkeypatch.setenv("SECRET", "s3cr3t")
    secret = tmp_path / "secret"
    secret.write_text("s3cr3t")
    assert "SECRET" not in run("import os; raise ValueError(sorted(os.environ))", try_namespaces).reason
    for path in (secret, f"/proc/{os.getpid()}/environ", "/proc/self/environ", "/etc/passwd"):
        outcome = run(f"raise ValueError(open({str(path)!r}).read())", try_namespaces)
        assert outcome.reason.startswith(("FileNotFoundError", "PermissionError"))


@BOTH
def test_there_is_no_network(try_namespaces):
    with subprocess.Popen(
        [sys.executable, "-c", "import socket; s = socket.create_server(('127.0.0.1', 0)); "
         "print(s.getsockname()[1], flush=True); s.accept(); print('reached')"],
        stdout=subprocess.PIPE, text=True,
    ) as server:  # fmt: skip
        port = int(server.stdout.readline())
        outcome = run(f"import socket; socket.create_connection(('127.0.0.1', {port}), 5)", try_namespaces)
        assert not outcome.passed
        assert outcome.reason.startswith(("OSError", "ConnectionRefusedError", "PermissionError"))
        server.kill()
        assert server.stdout.read() == ""


@BOTH
def test_output_is_dropped_and_files_are_limited(try_namespaces, capfd):
    assert run("import sys\nfor _ in range(100): print('x' * 10**6); print('y' * 10**6, file=sys.stderr)").passed
    assert capfd.readouterr() == ("", "")
    flood = "f = open('a', 'wb')\nwhile True: f.write(b'x' * 65536)"
    assert run(flood, try_namespaces).reason.startswith("OSError: [Errno 27] File too large")


@BOTH
def test_a_flooded_report_ends(try_namespaces):
    source = "import os\nfor number in range(3, 64):\n  try:\n    while True: os.write(number, b'x' * 4096)\n"
    source += "  except OSError: pass"
    assert not run(source, try_namespaces, wall_seconds=20).passed


@BOTH
def test_other_processes_survive(try_namespaces):
    source = f"""
import os, signal
for process in (os.getppid(), {os.getpid()}, {os.getppid()}):
    try:
        os.kill(process, signal.SIGKILL)
    except OSError:
        pass
"""
    victim = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1000)"])
    try:
        run(source + f"\nos.kill({victim.pid}, 9)", try_namespaces)
        assert victim.poll() is None
    finally:
        victim.kill()
        victim.wait()


def test_no_process_outlives_the_program(namespaces):
    # The copy leaves the session, so a signal to the group would not reach it.
    source = "import os, time\nif os.fork() == 0:\n  os.setsid()\n  time.sleep(12345)\n"
    assert run(source).passed
    wait_until(lambda: children_of_the_sandbox() == [])


def children_of_the_sandbox() -> list[str]:
    """Processes of the sandbox that this test process has started: their environment is empty, so the name decides."""
    found = []
    for folder in Path("/proc").iterdir():
        try:
            command = (folder / "cmdline").read_bytes()
            parent = (folder / "stat").read_text().rpartition(")")[2].split()[1]
        except OSError:
            continue
        if str(code_execution.CHILD).encode() in command and parent in ("1", str(os.getpid())):
            found.append(folder.name)
    return found


@BOTH
def test_a_killed_evaluation_leaves_no_program(try_namespaces):
    code = f"""
import subprocess
from megatron_cpt.evaluate.programs.code_execution import allow_code_execution, run_program

class Popen(subprocess.Popen):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        print(self.pid, flush=True)

subprocess.Popen = Popen
with allow_code_execution():
    run_program("import time; time.sleep(1000)", wall_seconds=1000, try_namespaces={try_namespaces})
"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as evaluation:
        child = int(evaluation.stdout.readline())
        wait_until(lambda: b"sandbox_child" in Path(f"/proc/{child}/cmdline").read_bytes())
        time.sleep(1)  # for the child to confine itself; before that, it ends at its next step
        evaluation.kill()
    wait_until(
        lambda: not Path(f"/proc/{child}").exists() or "\nState:\tZ" in Path(f"/proc/{child}/status").read_text()
    )


def wait_until(condition) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_sandbox_that_does_not_work_is_reported(monkeypatch, tmp_path):
    assert code_execution.available_isolation() in ("namespaces", "audit hook")
    broken = tmp_path / "child.py"
    broken.write_text("raise OSError")
    monkeypatch.setattr(code_execution, "CHILD", broken)
    with pytest.raises(UserError, match="programs cannot run in the sandbox on this machine"):
        code_execution.available_isolation()


def test_a_strict_umask_does_not_hide_python():
    before = os.umask(0o077)
    try:
        assert run("import json").passed
    finally:
        os.umask(before)


def test_the_isolation_is_named(namespaces):
    assert run("pass", try_namespaces=True).isolation == "namespaces"
    assert run("pass", try_namespaces=False).isolation == "audit hook"
    assert run("import os; assert sorted(os.listdir('/tmp')) == []").passed
