"""Measure on a GPU what this project claims, in one command within a budget of seconds.

    python3 tools/dev/gpu_measure.py --list                                    # the items and the predictions
    python3 tools/dev/gpu_measure.py --bundle .gpu --out OUT --budget 540      # on a machine with a GPU
    python3 tools/dev/gpu_measure.py --rehearse --out OUT                      # the same at toy width on a CPU

Needs only Python. `--bundle` is the folder that `make gpu-bundle` writes; without it, the items import what the
environment has. Each item of benchmarks/gpu/items.py runs in a process group of its own, which is killed at its limit
or at the end of the budget. The next item imports while one is measured, and waits for its turn.

OUT gets results.json, rewritten after every item, summary.md and log.txt. Everything else goes to a folder below
`--work`. `--resume` measures the items that are not done in OUT, and keeps everything else that OUT has.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from benchmarks.gpu.items import CONVENTION, ITEMS, PREDICTIONS, Item, Prediction  # noqa: E402
from tools.dev.gpu_results import (  # noqa: E402
    describe_status,
    log_header,
    print_table,
    read_figures,
    read_logs,
    read_results,
    read_tail,
    summarize,
    write_atomically,
)

POLL_SECONDS = 0.05
DEATH_SECONDS = 10.0  # after SIGKILL; a process inside the driver may take longer
SHARED_MEMORY = Path("/dev/shm")
LOG_BYTES = 1 << 20  # of one item in log.txt
MEASUREMENT_LIMITS = (540.0, 1.0)  # seconds for all items, factor of their limits
REHEARSAL_LIMITS = (3600.0, 20.0)  # a shared CPU is slower than the machine for which the limits were written
ENVIRONMENT = {
    "GLOO_SOCKET_IFNAME": "lo",
    "NCCL_SOCKET_IFNAME": "lo",
    "CUDA_DEVICE_MAX_CONNECTIONS": "1",
    "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",
    "PYTHONUNBUFFERED": "1",
    "PYTHONFAULTHANDLER": "1",
    "PYTHONWARNINGS": "ignore",  # of libraries, which would fill the end of a log; `train` ignores them, too
}
CACHES = {
    "TORCHINDUCTOR_CACHE_DIR": "inductor",
    "TRITON_CACHE_DIR": "triton",
    "CUDA_CACHE_PATH": "cuda",
    "TMPDIR": "tmp",
}


@dataclass(frozen=True, kw_only=True)
class Options:
    """Arguments of a measurement.

    Attributes:
        out: folder of the results.
        work: folder of everything else.
        bundle: folder that `make gpu-bundle` wrote; None imports what the environment has.
        budget: seconds for all items.
        is_rehearsal: toy width on a CPU.
        limit_factor: factor of the limits; a shared CPU is slower than the machine they were written for.
        resume: measure what is not done in `out`, and keep the rest.
    """

    out: Path
    work: Path
    bundle: Path | None = None
    budget: float = 540.0
    is_rehearsal: bool = False
    limit_factor: float = 1.0
    resume: bool = False

    @property
    def site(self) -> Path:
        """Folder into which the bundle is unpacked."""
        return self.work / "site"

    @property
    def memory(self) -> Path:
        """Folder for checkpoints: in main memory, if there is such a file system."""
        return (SHARED_MEMORY if SHARED_MEMORY.is_dir() else self.work) / f"{self.work.name}-memory"


class Child:
    """Process group of one item: started, waiting for its turn, running, and gone after `finish` or `kill`."""

    def __init__(self, item: Item, options: Options) -> None:
        self.item, self.started = item, time.monotonic()
        self.figures = options.work / f"{item.key}.json"
        self.log = options.work / f"{item.key}.log"
        self.figures.unlink(missing_ok=True)
        for folder in (options.work / item.key, options.memory / item.key):  # an interrupted run must not be resumed
            shutil.rmtree(folder, ignore_errors=True)
        turn, self._pipe = os.pipe()
        os.set_inheritable(turn, True)
        arguments = [f"--figures={self.figures}", f"--work={options.work / item.key}", f"--turn={turn}"]
        arguments += [f"--memory={options.memory / item.key}"]
        arguments += [f"--bundle={options.bundle}", f"--site={options.site}"] if options.bundle else []
        arguments += ["--rehearse"] if options.is_rehearsal else []
        with open(self.log, "wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, *item.command, *arguments],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                pass_fds=[turn],
                cwd=ROOT,
                env=environment(options),
            )
        os.close(turn)

    def begin(self) -> None:
        """Tell the process that it is its turn."""
        self.started = time.monotonic()
        with contextlib.suppress(BrokenPipeError):  # it ended before its turn; `finish` reports how
            os.write(self._pipe, b"1")
        self._close_pipe()

    def finish(self, limit: float) -> int | None:
        """Wait for the end of the process, at most `limit` seconds; return its status, None if it was killed here."""
        end = time.monotonic() + limit
        while time.monotonic() < end:
            # WNOWAIT keeps the process, so that its group id cannot belong to another process when it is killed.
            if os.waitid(os.P_PID, self._process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT):
                self.kill()
                return self._process.returncode
            time.sleep(POLL_SECONDS)
        self.kill()
        return None

    def kill(self) -> None:
        """Kill what is left of the process group."""
        self._close_pipe()
        if self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(DEATH_SECONDS)

    def _close_pipe(self) -> None:
        if self._pipe >= 0:
            os.close(self._pipe)
            self._pipe = -1


def environment(options: Options) -> dict[str, str]:
    """Return the environment of an item."""
    paths = [str(options.site)] if options.bundle else []
    paths += [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    for folder in CACHES.values():
        (options.work / folder).mkdir(parents=True, exist_ok=True)
    caches = {name: str(options.work / folder) for name, folder in CACHES.items()}
    hidden = {"CUDA_VISIBLE_DEVICES": ""} if options.is_rehearsal else {}
    return {**os.environ, **ENVIRONMENT, **caches, **hidden, "PYTHONPATH": os.pathsep.join(paths)}


@dataclass
class Measurement:
    """State of a measurement, as results.json has it."""

    options: Options
    items: Sequence[Item]
    predictions: Sequence[Prediction]
    results: dict[str, Any] = field(default_factory=dict)
    logs: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        self.results = {
            "started": now,
            "is_rehearsal": self.options.is_rehearsal,
            "budget_seconds": self.options.budget,
            "convention": CONVENTION,
            "items": {},
        }
        if self.options.resume and (self.options.out / "results.json").exists():
            before = read_results(self.options.out / "results.json")
            if before["is_rehearsal"] != self.options.is_rehearsal:
                sys.exit(f"{self.options.out}: a rehearsal and a measurement do not mix; choose another --out")
            self.results |= {"items": before["items"], "resumed": now, "started": before["started"]}
            self.logs = read_logs(self.options.out / "log.txt", before["items"])

    def run(self) -> None:
        """Measure every chosen item that is not done yet, within the budget."""
        self._end = time.monotonic() + self.options.budget
        queue = [item for item in self.items if self._is_due(item)]
        waiting: Child | None = None
        current: Child | None = None
        try:
            while queue:
                item = queue.pop(0)
                reason = self._reason_to_skip(item)
                if reason:
                    if waiting is not None:
                        waiting.kill()
                        waiting = None
                    self._record_skipped(item, reason)
                    continue
                current, waiting = waiting or Child(item, self.options), None
                self._record(item, "running")
                current.begin()
                if queue and not item.is_first and not self._reason_to_skip(queue[0]):
                    waiting = Child(queue[0], self.options)
                self._finish(current)
                current = None
        except KeyboardInterrupt as stop:
            reason = str(stop) or "interrupted"
            if current is not None:
                current.kill()
                self._record_end(current, "killed", reason)
            for item in queue:
                self._record_skipped(item, reason)
            raise
        finally:
            for child in (waiting, current):  # the current one is left only after an error, such as a full disk
                if child is not None:
                    child.kill()
            self.results["seconds"] = round(self.options.budget - self._left(), 1)
            self.write()

    def _is_due(self, item: Item) -> bool:
        is_done = self.results["items"].get(item.key, {}).get("status") == "done"
        return not is_done or (item.is_first and self.options.bundle is not None and not self.options.site.exists())

    def _left(self) -> float:
        return self._end - time.monotonic()

    def _reason_to_skip(self, item: Item) -> str:
        left = self._left()
        return (
            f"expects {item.expected:g} s, {max(0, left):.0f} s of the budget are left" if left < item.expected else ""
        )

    def _finish(self, child: Child) -> None:
        """Wait for an item within its limit, and record how it ended."""
        limit, left = child.item.limit * self.options.limit_factor, self._left()
        status = child.finish(min(limit, left))
        if status is None:
            self._record_end(
                child, "killed", f"reached its limit of {limit:g} s" if limit <= left else "the budget ended"
            )
        elif status != 0:
            self._record_end(child, "failed", describe_status(status, read_tail(child.log)))
        else:
            self._record_end(child, "done", "")

    def _record_end(self, child: Child, status: str, reason: str) -> None:
        """Record an item that has ended, with what it has measured by then."""
        figures, fault = read_figures(child.figures)
        if status == "done" and fault:
            status, reason = "failed", fault
        seconds = round(time.monotonic() - child.started, 2)
        log = child.log.read_bytes()[-LOG_BYTES:].decode(errors="replace")
        self.logs[child.item.key] = f"{log_header(child.item.key, child.item.title)}\n{log}\n"
        self._record(child.item, status, reason=reason, seconds=seconds, figures=figures, log_tail=read_tail(child.log))

    def _record_skipped(self, item: Item, reason: str) -> None:
        """Record that an item was not measured; what an earlier call has of it stays."""
        if self.results["items"].get(item.key, {}).get("status") in ("killed", "failed"):
            print(f"{item.key:3} skipped, the earlier figures stay: {reason}", flush=True)
            self.write()
        else:
            self._record(item, "skipped", reason=reason)

    def _record(self, item: Item, status: str, **more: Any) -> None:
        entry = {"title": item.title, "status": status, "expected": item.expected, "limit": item.limit, **more}
        self.results["items"][item.key] = entry
        if status != "running":
            seconds = f"{entry['seconds']:6.1f} s" if "seconds" in entry else " " * 8
            print(f"{item.key:3} {status:8} {seconds}  {item.title}  {entry.get('reason', '')}", flush=True)
        self.write()

    def write(self) -> None:
        """Rewrite results.json, summary.md and log.txt, each atomically."""
        figures = {key: entry.get("figures") or {} for key, entry in self.results["items"].items()}
        device = str(figures.get("0", {}).get("device", ""))
        verdicts = [prediction.judge(figures, device) for prediction in self.predictions]
        if self.options.is_rehearsal:  # a CPU at toy width neither meets nor misses what was predicted for a GPU
            verdicts = [{**verdict, "verdict": "not measured"} for verdict in verdicts]
        self.results["predictions"] = verdicts
        order = {item.key: number for number, item in enumerate(ITEMS)}
        entries = self.results["items"]
        keys = sorted(entries, key=lambda key: (order.get(key, len(order)), key))
        self.results["items"] = {key: entries[key] for key in keys}
        write_atomically(self.options.out / "results.json", json.dumps(self.results, indent=1) + "\n")
        write_atomically(self.options.out / "summary.md", summarize(self.results))
        write_atomically(self.options.out / "log.txt", "".join(self.logs[key] for key in keys if key in self.logs))


def choose(items: Sequence[Item], names: str | None) -> list[Item]:
    """Return the items that `--items` selects: "3" selects 3a to 3h, "3a" one of them."""
    if names is None:
        return list(items)
    wanted = [name.strip() for name in names.split(",") if name.strip()]
    unknown = [name for name in wanted if not any(_matches(item, name) for item in items)]
    if unknown:
        sys.exit(f"--items {', '.join(unknown)}: no such item; choose from {', '.join(item.key for item in items)}")
    return [item for item in items if any(_matches(item, name) for name in wanted)]


def _matches(item: Item, name: str) -> bool:
    return name in (item.key, item.key.rstrip("abcdefghij"))


def main(argv: Sequence[str] | None = None, *, items: Sequence[Item] = ITEMS) -> int:
    """Run the command; the exit status is 0 if every item is done."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="folder of the results")
    parser.add_argument("--bundle", type=Path, help="folder that `make gpu-bundle` wrote")
    parser.add_argument("--budget", type=float, help="seconds for all items (540; rehearsal: 3600)")
    parser.add_argument("--items", help="keys, separated by commas; all without it")
    parser.add_argument("--resume", action="store_true", help="measure only what is not done in OUT")
    parser.add_argument("--rehearse", action="store_true", help="toy width on a CPU")
    parser.add_argument("--limit-factor", type=float, help="factor of the items' limits (1; rehearsal: 20)")
    parser.add_argument("--work", type=Path, help="folder for everything else (a temporary folder)")
    parser.add_argument("--list", action="store_true", help="print the items and the predictions")
    arguments = parser.parse_args(argv)
    chosen = choose(items, arguments.items)
    budget, limit_factor = REHEARSAL_LIMITS if arguments.rehearse else MEASUREMENT_LIMITS
    budget = budget if arguments.budget is None else arguments.budget
    if arguments.list:
        print_table(chosen, PREDICTIONS, budget=budget)
        return 0
    if arguments.out is None:
        parser.error("--out is missing: name a folder for the results")
    if arguments.bundle is not None and not arguments.bundle.is_dir():
        parser.error(f"--bundle {arguments.bundle}: no such folder; `make gpu-bundle` writes it")
    if arguments.bundle is not None and not any(item.is_first for item in chosen):
        chosen = [item for item in items if item.is_first] + chosen  # it unpacks what the others import
    try:
        arguments.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"--out {arguments.out}: {error.strerror}; choose another folder")
    is_own = arguments.work is None
    work = Path(tempfile.mkdtemp(prefix="gpu-measure-")) if is_own else arguments.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    options = Options(
        out=arguments.out.resolve(),
        work=work,
        bundle=arguments.bundle.resolve() if arguments.bundle else None,
        budget=budget,
        is_rehearsal=arguments.rehearse,
        limit_factor=limit_factor if arguments.limit_factor is None else arguments.limit_factor,
        resume=arguments.resume,
    )
    measurement = Measurement(options, chosen, PREDICTIONS)
    signal.signal(signal.SIGTERM, _stop)
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # a lost terminal; `nohup` ignores it
        signal.signal(signal.SIGHUP, _stop)
    try:
        measurement.run()
    except KeyboardInterrupt as stop:
        print(f"stopped: {str(stop) or 'interrupted'}; {options.out} has what was measured", file=sys.stderr)
        return 1
    finally:
        shutil.rmtree(options.memory, ignore_errors=True)
        if is_own:
            shutil.rmtree(work, ignore_errors=True)
    print(f"\n{summarize(measurement.results)}\n{measurement.results['seconds']:g} s; results in {options.out}")
    return 0 if all(measurement.results["items"][item.key]["status"] == "done" for item in chosen) else 1


def _stop(number: int, _: Any) -> None:
    raise KeyboardInterrupt(f"stopped by {signal.Signals(number).name}")


if __name__ == "__main__":
    sys.exit(main())
