"""One small run under faults, restarted as by a scheduler until it is done.

A fault counts only if its effect was observed. Every start must resume from the newest valid checkpoint, or the drill
fails. A nuisance (a slow disk, reads that fail for a moment, a clock that is set) may come on top and must change
nothing; it counts if the preloaded library injected it.
"""

from __future__ import annotations

import ctypes
import os
import random
import re
import resource
import shutil
import signal
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import orjson

from megatron_cpt.checkpoint.layout import LATEST_FILE, checkpoints_folder, has_own_name, list_checkpoints
from megatron_cpt.checkpoint.manifest import find_faults
from megatron_cpt.errors import EXIT_FAILURE, EXIT_OK, EXIT_REFUSED, EXIT_STOPPED, RefusedError
from tests.helpers.faults import Death, cut, flip_bit
from tests.helpers.faulty_io import Control, Rule
from tests.helpers.job import Job

NUM_RANKS = 4
PATIENCE_SECONDS = 150.0  # for a rank to start, to make a step, to end; a loaded machine is slow
GRACE_SECONDS = 30.0  # for the other ranks to end after one failed, as torchrun gives them


class DrillError(AssertionError):
    """The run broke a guarantee; the message contains its output."""


@dataclass
class Tally:
    """Counters of a drill.

    Attributes:
        faults: with an observed effect, by kind.
        missed: without an effect, by kind.
        lives: starts of the job.
        recoveries: starts after a fault that resumed at the right step.
        steps_done: steps of the finished runs.
        steps_lost: steps repeated after a fault.
        most_steps_lost: steps repeated after one fault, at most.
        passed_over: corrupt checkpoints that a start found, named and skipped.
        launcher_kills: ranks that did not end by themselves after another one died, without ranks under SIGSTOP.
        seconds_down: from the end of a life to the first step of the next one.
    """

    faults: Counter[str] = field(default_factory=Counter)
    missed: Counter[str] = field(default_factory=Counter)
    lives: int = 0
    recoveries: int = 0
    steps_done: int = 0
    steps_lost: int = 0
    most_steps_lost: int = 0
    passed_over: int = 0
    launcher_kills: int = 0
    seconds_down: list[float] = field(default_factory=list)


class Drill:
    """A run directory and the faults that hit it."""

    def __init__(self, run_file: Path, output: Path, overrides: list[str], rng: random.Random, tally: Tally) -> None:
        self.output, self.folder = output, checkpoints_folder(output)
        self.arguments = [str(run_file), f"output={output}", *overrides]
        self.rng, self.tally = rng, tally
        self.control = Control(output.with_suffix(".faulty_io"))
        self._ended: float | None = None
        self._last_step = 0  # of the previous life

    def live(self, kind: str | None) -> int:
        """Run the job once, with a fault of this kind, and return its exit status; None: without a fault.

        Raises:
            DrillError: it started from scratch, resumed from the wrong step, hung, or ended with a wrong status.
        """
        harm = IN_LIFE[kind] if kind else None
        valid = self.newest_valid()
        found = self.published()
        before = self.metrics_inode()
        nuisance = self.rng.choice(sorted(NUISANCES)) if kind and self.rng.random() < NUISANCE_SHARE else None
        self.control.write(self._rules(kind, nuisance))
        prepare = partial(_prepare, self.control.path, self.death() if kind == "death at a change of a file" else None)
        with Job(NUM_RANKS, self.arguments, self.output.parent / "logs", prepare=prepare) as job:
            self.tally.lives += 1
            began = self.wait_for_step(job, valid + 1, before)
            self._note_start(job, valid, found, began)
            if harm is not None and began:
                self.wait_for_step(job, valid + self.rng.randint(1, 5), before)
                time.sleep(self.rng.uniform(0, 0.2))
                harm(self, job)
            try:
                status = job.wait(timeout=PATIENCE_SECONDS if kind else 10 * PATIENCE_SECONDS, grace=GRACE_SECONDS)
            except TimeoutError:
                self._fail(job, f"hung under {kind}" if kind != "full disk" else "continued, or hung, on a full disk")
            self._ended = time.monotonic()
            if began:
                self._last_step = self.last_step()
            self._judge(job, kind, status)
        if nuisance and self.control.hits()[-1]:
            self.tally.faults[nuisance] += 1
        for path in list_checkpoints(self.folder):
            if not has_own_name(path):
                shutil.rmtree(path)  # so that the next fault finds the run's own checkpoints
        return status

    def _rules(self, kind: str | None, nuisance: str | None) -> list[Rule]:
        data = f"{self.output.parent}/data/*"
        rules = [Rule("EIO", "read", data, first=self.rng.randint(30, 300))] if kind == "failing disk" else []
        return [*rules, NUISANCES[nuisance](self.rng, f"{self.output.parent}/*")] if nuisance else rules

    def harm_files(self, kind: str) -> bool:
        """Damage files of the newest checkpoint while nothing runs; return False if that must not be done."""
        newest = self.folder / f"step-{self.newest_valid():08d}"
        if len(self._valid_steps()) < 2:  # without another valid checkpoint the run would be refused
            return False
        AT_REST[kind](self, newest)
        self.tally.faults[kind] += 1
        return True

    def published(self) -> list[str]:
        """Return the names of the checkpoints."""
        return [path.name for path in list_checkpoints(self.folder)]

    def newest_valid(self) -> int:
        """Return the step of the newest valid checkpoint; 0: there is none."""
        return max(self._valid_steps(), default=0)

    def last_step(self) -> int:
        """Return the step of the last line of metrics.jsonl; 0: there is none."""
        path = self.output / "metrics.jsonl"
        lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []  # without an incomplete last line
        return max((int(orjson.loads(line)["step"]) for line in lines[-1:]), default=0)

    def metrics_inode(self) -> int:
        """Return the inode of metrics.jsonl, which changes when a new life rewrites the file."""
        path = self.output / "metrics.jsonl"
        return path.stat().st_ino if path.exists() else 0

    def wait_for_step(self, job: Job, step: int, inode_before: int) -> bool:
        """Wait until this life has done a step; return False if it ended before."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        while self.metrics_inode() == inode_before or self.last_step() < step:
            if not job.is_running():
                return False
            if time.monotonic() > deadline:
                self._fail(job, f"did not reach step {step}")
            time.sleep(0.005)
        return True

    def death(self) -> Callable[[int], None]:
        """Return the function that lets a rank die before a random change of a file."""
        rank = self.rng.randrange(NUM_RANKS)
        number = self.rng.randint(1, 60 if rank == 0 else 12)  # the main rank writes most of the files
        return partial(_die_later, rank, number, str(self.output))

    def _valid_steps(self) -> list[int]:
        return [int(path.name.removeprefix("step-")) for path in list_checkpoints(self.folder) if _is_valid(path)]

    def _note_start(self, job: Job, valid: int, found: list[str], began: bool) -> None:
        output = job.output()
        origin = re.search(r"resuming from \S+/step-(\d+)", output)
        if not began and origin is None:
            return  # it died before it printed the line
        if (int(origin[1]) if origin else 0) != valid:
            self._fail(job, f"resumed from step {origin[1] if origin else 0}, but the newest valid step is {valid}")
        newer = {name for name in found if int(name.removeprefix("step-")) > valid}
        named = set(re.findall(r"checkpoint \S+/(step-\d+) is (?:corrupt|under another name) and is skipped", output))
        if named != newer:
            self._fail(job, f"skipped {sorted(named)}, but {sorted(newer)} are corrupt")
        self.tally.passed_over += len(newer)
        lost, self._last_step = max(self._last_step - valid, 0), valid
        self.tally.steps_lost += lost
        self.tally.most_steps_lost = max(self.tally.most_steps_lost, lost)
        if self._ended is not None:
            self.tally.recoveries += 1
            self.tally.seconds_down.append(time.monotonic() - self._ended)

    def _judge(self, job: Job, kind: str | None, status: int) -> None:
        if status == EXIT_OK:
            self.tally.missed.update([kind] if kind else [])
            return
        if kind is None:
            self._fail(job, f"ended with status {status} without a fault")
        statuses = job.statuses()
        if kind in ("SIGTERM to all", "SIGTERM to one rank", "SIGUSR1 to all", "SIGTERM twice"):
            if status != EXIT_STOPPED or self.newest_valid() != self._last_step:
                self._fail(job, f"{kind}: statuses {statuses}, saved step {self.newest_valid()} of {self._last_step}")
        elif kind == "full disk":
            if status != EXIT_FAILURE or "File too large" not in job.output():
                self._fail(job, f"full disk: statuses {statuses}")
        elif kind == "failing disk":
            if status != EXIT_FAILURE or "Input/output error" not in job.output():
                self._fail(job, f"failing disk: statuses {statuses}")
        elif kind == "frozen host of the store":
            if statuses != [EXIT_FAILURE] * NUM_RANKS or "the store of the job gave no answer" not in job.output():
                self._fail(job, f"frozen host of the store: statuses {statuses}")
        elif status != EXIT_FAILURE or -signal.SIGKILL not in statuses:
            self._fail(job, f"{kind}: statuses {statuses}")
        elif kind == "kill in a save" and not list(self.folder.glob(".step-*")):
            kind = "kill"  # the save ended before the signal came
        if kind == "SIGSTOP":
            if len(job.left_behind) != 1:
                self._fail(job, f"SIGSTOP: ranks {job.left_behind} had to be killed, not only the stopped one")
        else:
            self.tally.launcher_kills += len(job.left_behind)
        self.tally.faults[str(kind)] += 1

    def _fail(self, job: Job, message: str) -> None:
        job.kill()
        raise DrillError(f"{message}\n{self.output}: {self.published()}\n{job.output()}")


def _is_valid(checkpoint: Path) -> bool:
    try:
        return has_own_name(checkpoint) and not find_faults(checkpoint)
    except RefusedError:
        return False


def _prepare(control: Path, death: Callable[[int], None] | None, rank: int) -> None:
    ctypes.CDLL(None).faulty_io_load(str(control).encode())
    if death is not None:
        death(rank)


def _die_later(dying_rank: int, number: int, output: str, rank: int) -> None:
    if rank == dying_rank:
        Death(Path(output), number, Path(f"{output}.journal"))


def _signal(number: signal.Signals, drill: Drill, job: Job) -> None:
    job.send(number)


def _signal_one(number: signal.Signals, drill: Drill, job: Job) -> None:
    job.send(number, drill.rng.randrange(NUM_RANKS))


def _signal_twice(drill: Drill, job: Job) -> None:
    job.send(signal.SIGTERM)
    time.sleep(drill.rng.uniform(0, 0.2))
    job.send(signal.SIGTERM)


def _kill_in_a_save(drill: Drill, job: Job) -> None:
    old = set(drill.folder.glob(".step-*"))
    while job.is_running() and not set(drill.folder.glob(".step-*")) - old:
        time.sleep(0.001)
    time.sleep(drill.rng.uniform(0, 0.1))
    job.send(signal.SIGKILL, drill.rng.randrange(NUM_RANKS))


def _fill_disk(drill: Drill, job: Job) -> None:
    """Limit the size of files to one that logs and metrics stay below, and shards do not."""
    limit = (drill.rng.randint(40_000, 90_000), resource.RLIM_INFINITY)
    resource.prlimit(job.pids[drill.rng.randrange(NUM_RANKS)], resource.RLIMIT_FSIZE, limit)


def _freeze_store(drill: Drill, job: Job) -> None:
    job.freeze_store()


def _nothing(drill: Drill, job: Job) -> None:
    """Do nothing, because the fault happens inside the rank; see `Drill.death` and `Drill._rules`."""


def _any_file(drill: Drill, checkpoint: Path) -> Path:
    return drill.rng.choice(sorted(path for path in checkpoint.rglob("*") if path.is_file() and path.stat().st_size))


def _flip(drill: Drill, checkpoint: Path) -> None:
    path = _any_file(drill, checkpoint)
    flip_bit(path, drill.rng.randrange(8 * path.stat().st_size))


def _cut(drill: Drill, checkpoint: Path) -> None:
    path = _any_file(drill, checkpoint)
    cut(path, drill.rng.randrange(path.stat().st_size))


def _remove(drill: Drill, checkpoint: Path) -> None:
    _any_file(drill, checkpoint).unlink()


def _spoil_latest(drill: Drill, checkpoint: Path) -> None:
    content = drill.rng.choice([b"", os.urandom(40), b"step-99999999\n", b"../../somewhere\n"])
    (drill.folder / LATEST_FILE).write_bytes(content)


def _copy(drill: Drill, checkpoint: Path) -> None:
    """Copy a checkpoint to the name of a later step."""
    shutil.copytree(checkpoint, drill.folder / "step-00000099")


def _clean(drill: Drill, checkpoint: Path) -> None:
    """Start the run while its checkpoints are gone, which must be refused and change nothing; then restore them."""
    aside = drill.output.with_suffix(".aside")
    os.rename(drill.folder, aside)
    before = (drill.output / "metrics.jsonl").read_bytes()
    with Job(NUM_RANKS, drill.arguments, drill.output.parent / "logs") as job:
        job.wait(timeout=PATIENCE_SECONDS)
        is_refused = job.statuses() == [EXIT_REFUSED] * NUM_RANKS and "gone or not mounted" in job.output()
        if not is_refused or (drill.output / "metrics.jsonl").read_bytes() != before:
            raise DrillError(f"a run without its checkpoints: statuses {job.statuses()}\n{job.output()}")
    os.rename(aside, drill.folder)


def _half_a_save(drill: Drill, checkpoint: Path) -> None:
    """Leave the temporary folder of a save whose step never comes again."""
    shutil.copytree(checkpoint, drill.folder / ".step-99999998.tmp", dirs_exist_ok=True)


IN_LIFE: dict[str, Callable[[Drill, Job], None]] = {
    "kill": partial(_signal_one, signal.SIGKILL),
    "kill of all": partial(_signal, signal.SIGKILL),
    "kill in a save": _kill_in_a_save,
    "death at a change of a file": _nothing,
    "SIGTERM to all": partial(_signal, signal.SIGTERM),
    "SIGTERM to one rank": partial(_signal_one, signal.SIGTERM),
    "SIGUSR1 to all": partial(_signal, signal.SIGUSR1),
    "SIGTERM twice": _signal_twice,
    "SIGSTOP": partial(_signal_one, signal.SIGSTOP),
    "full disk": _fill_disk,
    "failing disk": _nothing,
    "frozen host of the store": _freeze_store,
}
AT_REST: dict[str, Callable[[Drill, Path], None]] = {
    "bit flipped": _flip,
    "file cut": _cut,
    "file missing": _remove,
    "latest spoilt": _spoil_latest,
    "half a save left over": _half_a_save,
    "checkpoint copied": _copy,
    "checkpoints gone": _clean,
}
# Rules for files below a folder; three failing attempts of five are within the retries.
NUISANCES: dict[str, Callable[[random.Random, str], Rule]] = {
    "burst of EIO": lambda rng, files: Rule("EIO", "read", files, first=rng.randint(1, 300), count=rng.randint(1, 3)),
    "burst of ESTALE": lambda rng, files: Rule("ESTALE", "read", files, first=rng.randint(1, 300), count=1),
    "short reads": lambda rng, files: Rule("short", "read", files, value=rng.randint(1, 4096)),
    "slow disk": lambda rng, files: Rule("delay", "any", files, count=200, value=rng.randint(1, 50)),
    "clock set": lambda rng, _: Rule("shift", "clock", "*", first=rng.randint(1, 50), value=10 * 86400),
}
NUISANCE_SHARE = 0.5  # share of the lives with a fault that also have a nuisance
