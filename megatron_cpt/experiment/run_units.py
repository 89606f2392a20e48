"""Training of the runs of an experiment as processes on this machine, one after the other or several at once."""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import filelock
import orjson

from megatron_cpt.config import format_duration
from megatron_cpt.errors import (
    EXIT_INTERRUPTED,
    EXIT_OK,
    EXIT_STOPPED,
    CptError,
    RefusedError,
    UserError,
)
from megatron_cpt.experiment import child_process
from megatron_cpt.experiment.arms import Experiment, Unit
from megatron_cpt.experiment.input_fingerprints import InputFingerprints
from megatron_cpt.experiment.unit_result import (
    changes_since_start,
    finish_unit,
    read_result,
    refuse_changes,
    set_run_aside,
    write_run_file,
)
from megatron_cpt.files.whole_io import read_file
from megatron_cpt.provenance.run_history import METRICS_FILE

_POLL_SECONDS = 0.1
_TAIL_BYTES = 1 << 16
_STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
_NVIDIA_GPUS = Path("/proc/driver/nvidia/gpus")

Tell = Callable[[str], None]
Advance = Callable[[int], None]


@dataclass
class _Process:
    """A run that trains: its process, its slot among the `--jobs` and the steps that its metrics show."""

    unit: Unit
    process: subprocess.Popen[bytes]
    slot: int
    started: float
    step: int


@dataclass
class _Stop:
    """Stop signals received so far; a second Ctrl-C kills the runs."""

    num_signals: int = 0
    num_interrupts: int = 0

    def handle(self, number: int, _frame: FrameType | None) -> None:
        self.num_signals += 1
        self.num_interrupts += number == signal.SIGINT


@dataclass
class _Grid:
    """Runs that wait, train and have ended."""

    total: int
    waiting: list[Unit]
    running: list[_Process] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    statuses: set[int] = field(default_factory=set)
    is_stopped: bool = False
    started: float = field(default_factory=time.monotonic)
    steps_done: int = 0

    @property
    def num_ended(self) -> int:
        return self.total - len(self.waiting) - len(self.running)

    def time_left(self) -> str:
        """Return the time left as text, from the steps per second so far."""
        left = sum(unit.plan.steps for unit in self.waiting) + sum(
            one.unit.plan.steps - one.step for one in self.running
        )
        if not left or not self.steps_done:
            return ""
        seconds = (time.monotonic() - self.started) * left / self.steps_done
        return f"; about {format_duration(round(seconds))} left"


def unfinished_units(experiment: Experiment, units: Sequence[Unit], *, restart_changed: bool, tell: Tell) -> list[Unit]:
    """Return the runs that have to be trained; runs on the disk must be what their arm would be now.

    Args:
        restart_changed: rename the run directories of changed runs instead of refusing them.

    Raises:
        RefusedError: a run on the disk was trained with other settings or files.
    """
    fingerprints = InputFingerprints()
    found = {unit.name: changes_since_start(unit, fingerprints) for unit in units}
    changed = {name: changes for name, changes in found.items() if changes}
    if not restart_changed:
        refuse_changes(changed)
    for unit in units:
        if unit.name in changed:
            tell(f"{unit.name}: trained with other settings or files; its files are now in {set_run_aside(unit)}")
    return [unit for unit in units if read_result(unit) is None]


@contextlib.contextmanager
def experiment_lock(output: Path) -> Iterator[None]:
    """Hold the lock of an experiment's folder.

    Raises:
        UserError: another process holds it.
    """
    try:
        output.mkdir(parents=True, exist_ok=True)
        lock = filelock.FileLock(output / ".lock", timeout=0)
        lock.acquire()
    except filelock.Timeout as error:
        raise UserError(f"output: {output}: another experiment runs in it; wait until it ends, or stop it") from error
    except OSError as error:
        raise CptError(f"output: {output}: cannot be written: {error.strerror}; choose another output") from error
    try:
        yield
    finally:
        lock.release()


def train_units(experiment: Experiment, units: Sequence[Unit], *, jobs: int, tell: Tell, advance: Advance) -> int:
    """Train runs, `jobs` at once. A run that fails does not stop the others.

    Args:
        tell: receives one line per event.
        advance: receives numbers of finished steps.

    Returns:
        0; 75 after a stop signal or if a run stopped itself after a save; 130 after a second Ctrl-C.

    Raises:
        CptError: runs have failed; with the exit status that all of them share, else 1.
    """
    slots = gpu_slots(visible_gpus(os.environ), jobs, max(experiment.ranks[unit.arm] for unit in units))
    grid = _Grid(len(units), list(units))
    free = list(range(jobs))
    with _handle_stop() as stop, _ended_with_this_call(grid):
        while grid.running or (grid.waiting and not grid.is_stopped):
            while grid.waiting and free and not grid.is_stopped:
                unit, slot = grid.waiting.pop(0), free.pop(0)
                grid.running.append(_start(experiment, unit, slot, slots))
                tell(f"[{grid.total - len(grid.waiting)}/{grid.total}] {unit.name}: started{grid.time_left()}")
            if stop.num_signals and not grid.is_stopped:
                grid.is_stopped = True
                tell("stopping: the runs save a checkpoint and end; run the same command again to resume")
                _signal_all(grid, signal.SIGTERM)
            if stop.num_interrupts > 1:
                _kill_all(grid)
                return EXIT_INTERRUPTED
            time.sleep(_POLL_SECONDS)
            for one in list(grid.running):
                _watch(experiment, grid, one, free, tell, advance)
    return _final_status(grid)


def _watch(experiment: Experiment, grid: _Grid, one: _Process, free: list[int], tell: Tell, advance: Advance) -> None:
    """Note the progress of a run, and its end."""
    status = one.process.poll()
    step = max(one.step, _last_step(one.unit))
    advance(step - one.step)
    grid.steps_done += step - one.step
    one.step = step
    if status is None:
        return
    grid.running.remove(one)
    free.append(one.slot)
    seconds = format_duration(round(time.monotonic() - one.started))
    if status == EXIT_OK and os.environ.get("CPT_HEAD") and os.environ.get("SLURM_NODEID", "0") != "0":
        return  # the first node of the run writes the result
    if status == EXIT_OK:
        try:
            result = finish_unit(one.unit, keep_checkpoints=experiment.config.keep_checkpoints != "none")
        except CptError as error:
            grid.failures.append(f"{one.unit.name}: {error}")
            grid.statuses.add(error.exit_status)
            return
        losses = ", ".join(f"{name} {loss:.4f}" for name, loss in result.held_out.items())
        tell(f"[{grid.num_ended}/{grid.total}] {one.unit.name}: finished in {seconds}: {losses}{grid.time_left()}")
    elif status == EXIT_STOPPED:
        grid.is_stopped = True
        tell(f"{one.unit.name}: stopped after a save")
    else:
        if grid.is_stopped and status < 0:
            return  # a run without a handler for the signal yet has nothing to save
        grid.statuses.add(status if status > 0 else 1)
        grid.failures.append(f"{one.unit.name}: status {status}: {_last_lines(one.unit.log_file)}")
        tell(f"{one.unit.name}: failed with status {status}; see {one.unit.log_file}")


def _final_status(grid: _Grid) -> int:
    if grid.failures:
        text = "\n".join([f"{len(grid.failures)} of {grid.total} runs failed:", *(f"  - {f}" for f in grid.failures)])
        kinds: dict[int, type[CptError]] = {2: UserError, 3: RefusedError}
        raise (kinds.get(next(iter(grid.statuses)), CptError) if len(grid.statuses) == 1 else CptError)(text)
    return EXIT_STOPPED if grid.is_stopped else EXIT_OK


def train_command(experiment: Experiment, unit: Unit, environment: Mapping[str, str] = os.environ) -> list[str]:
    """Return the arguments of `megatron-cpt` that train a run: `train`, under `launch` if it has several processes.

    Over several nodes of a SLURM job every node starts its share: the script of `--engine slurm` sets CPT_HEAD.
    """
    ranks = experiment.ranks[unit.arm]
    train = ["train", str(unit.run_file)]
    nodes = int(environment.get("SLURM_JOB_NUM_NODES", "1")) if "CPT_HEAD" in environment else 1
    if ranks == 1:
        return train
    options = ["--nproc-per-node", str(ranks // nodes)]
    if nodes > 1:
        node = environment.get("SLURM_NODEID", "0")
        options += ["--nnodes", str(nodes), "--node-rank", node, "--rdzv-backend", "c10d"]
        options += ["--rdzv-id", environment["CPT_JOB"], "--rdzv-endpoint", environment["CPT_HEAD"]]
        options += ["--rdzv-conf", f"is_host={int(node == '0')},join_timeout=900"]
    return ["launch", *options, "--", *train]


def visible_gpus(environment: Mapping[str, str]) -> list[str]:
    """Return the GPUs that runs may use, without loading CUDA: CUDA_VISIBLE_DEVICES, or all of the machine."""
    named = environment.get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        return [name for name in named.split(",") if name.strip()]
    return [str(n) for n in range(len(list(_NVIDIA_GPUS.iterdir())))] if _NVIDIA_GPUS.is_dir() else []


def gpu_slots(gpus: Sequence[str], jobs: int, ranks: int) -> list[str] | None:
    """Return CUDA_VISIBLE_DEVICES per slot; None on a machine without GPUs.

    Example:
        >>> gpu_slots(["0", "1", "2", "3"], jobs=2, ranks=2)
        ['0,1', '2,3']

    Raises:
        UserError: the machine has fewer GPUs than the runs need.
    """
    if not gpus:
        return None
    if jobs * ranks > len(gpus):
        raise UserError(
            f"--jobs {jobs}: {jobs} runs of {ranks} ranks need {jobs * ranks} GPUs, this machine has {len(gpus)}; "
            "choose fewer jobs"
        )
    return [",".join(gpus[slot * ranks : (slot + 1) * ranks]) for slot in range(jobs)]


def _start(experiment: Experiment, unit: Unit, slot: int, slots: list[str] | None) -> _Process:
    write_run_file(unit)
    arguments = train_command(experiment, unit)
    # One thread per process, so that --jobs does not change the sums of a CPU run in their last digit.
    environment = {"OMP_NUM_THREADS": "1", **os.environ}
    if slots is not None:
        environment["CUDA_VISIBLE_DEVICES"] = slots[slot]
    try:
        with unit.log_file.open("ab") as log:
            log.write(f"$ megatron-cpt {shlex.join(arguments)}\n".encode())
            log.flush()
            process = subprocess.Popen(
                child_process.command(arguments),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,  # Ctrl-C reaches this process only, which passes it on
            )
    except OSError as error:
        raise CptError(f"{unit.log_file}: cannot be written: {error.strerror}; free some space") from error
    return _Process(unit, process, slot, time.monotonic(), _last_step(unit))


def _last_step(unit: Unit) -> int:
    """Return the step of the last complete line of metrics; 0 without one."""
    try:
        with (unit.folder / METRICS_FILE).open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - _TAIL_BYTES))
            lines = file.read().split(b"\n")[:-1]
    except OSError:
        return 0
    for line in reversed(lines):
        with contextlib.suppress(ValueError, TypeError, LookupError):
            return min(int(orjson.loads(line)["step"]), unit.plan.steps)
    return 0


def _last_lines(log: Path) -> str:
    """Return the last error message in a log: from its last line `megatron-cpt: error:` on."""
    try:
        text = read_file(log)[-_TAIL_BYTES:].decode(errors="replace").strip()
    except OSError:
        return f"see {log}"
    _, mark, message = text.rpartition("megatron-cpt: error: ")
    return message if mark else text.splitlines()[-1] if text else f"see {log}"


@contextlib.contextmanager
def _handle_stop() -> Iterator[_Stop]:
    stop = _Stop()
    handled = [number for number in _STOP_SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
    earlier: dict[signal.Signals, Any] = {number: signal.signal(number, stop.handle) for number in handled}
    try:
        yield stop
    finally:
        for number, previous in earlier.items():
            signal.signal(number, previous)


@contextlib.contextmanager
def _ended_with_this_call(grid: _Grid) -> Iterator[None]:
    """Stop the runs if the block raises, for example because the disk is full."""
    try:
        yield
    except BaseException:
        _signal_all(grid, signal.SIGTERM)
        raise


def _signal_all(grid: _Grid, number: signal.Signals) -> None:
    for one in grid.running:
        one.process.send_signal(number)


def _kill_all(grid: _Grid) -> None:
    for one in grid.running:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(one.process.pid, signal.SIGKILL)
        one.process.wait()
