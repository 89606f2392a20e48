"""A stand-in for SLURM: scripts named `srun`, `scontrol` and `squeue` on PATH, for one job at a time.

Nodes are processes of this machine. `srun` starts its command once per node with SLURM's variables, writes the output
of each task to the file of `--output`, and ends with the highest exit status of the tasks. It kills the other tasks
when one fails (`--kill-on-bad-exit=1`), or some seconds after the first one has ended (`--wait`).
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import psutil

_SRUN = """\
import os, subprocess, sys, time
words = sys.argv[1:]
given = dict(word[2:].partition("=")[::2] for word in words if word.startswith("--"))
command = words[next(at for at, word in enumerate(words) if not word.startswith("--")):]
tasks = []
for node in range(int(os.environ["SLURM_JOB_NUM_NODES"])):
    name = given["output"]
    for key, value in {"%x": os.environ["SLURM_JOB_NAME"], "%j": os.environ["SLURM_JOB_ID"], "%t": str(node)}.items():
        name = name.replace(key, value)
    log = open(name, {"append": "ab"}.get(given.get("open-mode"), "wb"))
    numbers = {"SLURM_NODEID": str(node), "SLURM_PROCID": str(node)}
    tasks.append(subprocess.Popen(command, env={**os.environ, **numbers}, stdout=log, stderr=log))
deadline = None
while any(task.poll() is None for task in tasks):
    if deadline is None and any(task.poll() is not None for task in tasks):
        deadline = time.monotonic() + float(given["wait"])
    is_bad = given["kill-on-bad-exit"] == "1" and any(task.poll() for task in tasks)
    if is_bad or (deadline is not None and time.monotonic() > deadline):
        for task in tasks:
            if task.poll() is None:
                task.kill()
    time.sleep(0.05)
sys.exit(max(task.returncode if task.returncode >= 0 else 128 - task.returncode for task in tasks))
"""
_SCONTROL = """\
import os, sys
if sys.argv[1:3] == ["show", "hostnames"]:
    print("\\n".join(sys.argv[3].split(",")))
elif sys.argv[1] == "requeue":
    open(os.environ["STAND_IN_REQUEUED"], "a").write(sys.argv[2] + "\\n")
else:
    sys.exit(f"scontrol: {sys.argv[1:]} is not known here")
"""
_SQUEUE = """\
import os
print(os.environ["STAND_IN_STATE"])
"""


class Slurm:
    """One job.

    Attributes:
        folder: folder of submission.
        state: state that `squeue` prints.
        starts: number of starts so far.
    """

    def __init__(self, folder: Path, script: Path, *, num_nodes: int, job_id: int = 4711) -> None:
        self.folder, self.state, self.starts = folder, "RUNNING", 0
        self._script, self._num_nodes, self._job_id = script, num_nodes, job_id
        self._requeued = folder / "requeued"
        bin_folder = folder / "bin"
        bin_folder.mkdir(parents=True)
        (folder / "logs").mkdir()
        for name, code in (("srun", _SRUN), ("scontrol", _SCONTROL), ("squeue", _SQUEUE)):
            (bin_folder / name).write_text(f"#!{sys.executable}\n{code}")
            (bin_folder / name).chmod(0o755)

    def start(self, arguments: Sequence[str], **variables: str) -> subprocess.Popen[bytes]:
        """Run the batch script as SLURM does on the first node of a job."""
        environment = {
            **os.environ,
            "PATH": f"{self.folder / 'bin'}:{os.environ['PATH']}",
            "SLURM_JOB_ID": str(self._job_id),
            "SLURM_JOB_NAME": "rehearsal",
            "SLURM_JOB_NUM_NODES": str(self._num_nodes),
            "SLURM_JOB_NODELIST": ",".join(["localhost"] * self._num_nodes),
            "SLURM_CPUS_ON_NODE": str(os.cpu_count()),
            "SLURM_SUBMIT_DIR": str(self.folder),
            "SLURM_RESTART_COUNT": str(self.starts),
            "STAND_IN_REQUEUED": str(self._requeued),
            "STAND_IN_STATE": self.state,
            **variables,
        }
        self.starts += 1
        log = (self.folder / "batch.log").open("ab")
        return subprocess.Popen(
            ["bash", str(self._script), *arguments], cwd=self.folder, env=environment, stdout=log, stderr=log
        )

    def was_requeued(self) -> int:
        """Return how often the script requeued the job."""
        return self._requeued.read_text().count(str(self._job_id)) if self._requeued.exists() else 0

    def signal_step(self, batch: subprocess.Popen[bytes], number: signal.Signals) -> int:
        """Send a signal to every process of the job step except the shell and srun, as `--signal=USR1@600` does.

        Returns:
            The number of processes.
        """
        (srun,) = psutil.Process(batch.pid).children()
        processes = srun.children(recursive=True)
        for process in processes:
            process.send_signal(number)
        return len(processes)

    def output(self) -> str:
        """Return all output of the job."""
        logs = [self.folder / "batch.log", *sorted((self.folder / "logs").glob("*.log"))]
        return "\n".join(f"--- {log.name}\n{log.read_text(errors='replace')}" for log in logs if log.exists())


def free_port() -> str:
    """Return a free port that the operating system chose."""
    with socket.socket() as server:
        server.bind(("", 0))
        return str(server.getsockname()[1])


def wait_for_lines(path: Path, count: int, process: subprocess.Popen[bytes], *, timeout: float = 300.0) -> None:
    """Wait until a file has at least `count` lines.

    Raises:
        AssertionError: the process ended first, or the timeout expired.
    """
    deadline = time.monotonic() + timeout
    while not path.exists() or path.read_bytes().count(b"\n") < count:
        assert process.poll() is None, f"ended early with status {process.returncode}"
        assert time.monotonic() < deadline, f"{path} has fewer than {count} lines after {timeout} s"
        time.sleep(0.05)
