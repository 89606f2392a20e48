"""Drill: small runs under random faults, restarted as by a scheduler, compared with an undisturbed run.

    make soak FAULTS=50 MINUTES=10                                    # or with the seed of an earlier drill:
    python -m benchmarks.soak [--faults 50] [--minutes 10] [--seed 7] [--folder /fast/disk]

Each run trains 60 steps of a small Llama in bf16 on 4 processes (tensor parallel 2 x data parallel 2) over a phase
switch. It saves every 3 steps and keeps 3 checkpoints; every second run saves asynchronously. The faults: ranks are
killed during a save, at one exact operation on a file, or all together; they get SIGTERM, SIGUSR1 or SIGSTOP; their
disk is full or fails; the host of the job's store freezes. Between two lives of the job, bits of the newest checkpoint
are flipped, its files cut or removed, and checkpoints are copied to another name or cleaned away. On top, the disk is
slow or fails for a moment, and the clock is set.

At its end a run's weights, optimizer, random states, counters and every line of metrics.jsonl (except the speed) must
equal the undisturbed run bit for bit. A fault counts only if its effect was observed; see drill.py.

results/soak.json contains the sums over all drills. The seed decides kinds, ranks, files, bits and delays. The load
of the machine decides where a delay ends, so a seed repeats a drill approximately.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import random
import shutil
import statistics
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

import orjson

from benchmarks.drill import AT_REST, IN_LIFE, NUM_RANKS, Drill, DrillError, Tally
from benchmarks.record import RESULTS, machine, write_result
from tests.helpers.checkpoints import differing
from tests.helpers.faulty_io import build
from tests.helpers.job import Job
from tests.helpers.runs import newest, read_reproducible_metrics, small_run

STEPS, EVERY, KEEP = 60, 3, 3
MARGIN = 15  # no faults in the last steps, where the run may end before they hit
AT_REST_SHARE = 0.4  # share of the lives that begin with damaged files
RUN = {
    "model": {"preset": "tiny_llama", "layers": 2, "hidden": 64, "ffn_hidden": 96, "vocab": 257},
    "precision": {"compute": "bf16"},
    "parallel": {"tensor": 2, "sequence": True, "distributed_optimizer": True},
    "tokens": STEPS * 8 * 32,
    "checkpoint": {"every": EVERY, "keep": KEEP},
    # a stopped rank is noticed by its missing heartbeat; ranks on a loaded machine may miss it for seconds
    "resilience": {"peer_timeout": 15, "hang_timeout": 120},
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--faults", type=int, default=50, help="number of faults")
    parser.add_argument("--minutes", type=float, default=10.0, help="time after which no further fault is made")
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(10**6))
    parser.add_argument("--folder", help="folder for the runs")
    options = parser.parse_args()
    print(f"seed {options.seed}: up to {options.faults} faults, {options.minutes:g} minutes")
    folder = Path(tempfile.mkdtemp(prefix="soak.", dir=options.folder))
    preload_faulty_io()
    started, tally, num_runs, num_equal = time.monotonic(), Tally(), 0, 0
    run_file = small_run(folder, **RUN)
    quiet = train_quietly(run_file, folder / "quiet")

    def is_over() -> bool:
        return tally.faults.total() >= options.faults or time.monotonic() - started > 60 * options.minutes

    failure = None
    while not is_over() and failure is None:
        output = folder / f"run-{num_runs}"
        overrides = [f"checkpoint.async={'true' if num_runs % 2 else 'false'}"]
        drill = Drill(run_file, output, overrides, random.Random(f"{options.seed}/{num_runs}"), tally)
        num_runs += 1
        try:
            disturb_until_done(drill, is_over)
            failure = difference(quiet, output)
        except DrillError as error:
            failure = str(error)
        if failure is None:
            num_equal += 1
            shutil.rmtree(output)
        print(
            f"run {num_runs}: {tally.faults.total()} faults so far, {tally.lives} starts, "
            f"{time.monotonic() - started:.0f} s",
            flush=True,
        )
    seconds = time.monotonic() - started
    write_ledger(summary(options.seed, tally, num_runs, num_equal, seconds, failure))
    if failure is not None:
        print(f"FAILED, in {folder}:\n{failure}")
        return 1
    shutil.rmtree(folder)
    return 0


def preload_faulty_io() -> None:
    """Let the server from which ranks are forked start with the library that injects faults; it has no rules yet."""
    library = build()
    if library is None:
        raise SystemExit("the drill needs a C compiler")
    os.environ["LD_PRELOAD"] = str(library)


def train_quietly(run_file: Path, output: Path, *overrides: str) -> Path:
    """Train the undisturbed run."""
    with Job(NUM_RANKS, [str(run_file), f"output={output}", *overrides], output.parent / "logs") as job:
        if (status := job.wait(timeout=600)) != 0:
            raise SystemExit(f"the undisturbed run ended with status {status}\n{job.output()}")
    return output


def disturb_until_done(drill: Drill, is_over: Any) -> None:
    """Restart a run, with one fault per life except near its end, until it ends with status 0."""
    while True:
        is_quiet = is_over() or drill.newest_valid() > STEPS - MARGIN
        if not is_quiet and drill.rng.random() < AT_REST_SHARE:
            drill.harm_files(drill.rng.choice(sorted(AT_REST)))
        if drill.live(None if is_quiet else drill.rng.choice(sorted(IN_LIFE))) == 0:
            break
    drill.tally.steps_done += STEPS


def difference(quiet: Path, output: Path) -> str | None:
    """Return the first difference from the undisturbed run; None: they are identical bit for bit."""
    tensors = differing(newest(quiet), newest(output))
    if tensors:
        return f"{output}: tensors differ: {tensors}"
    states = [orjson.loads((newest(each) / "state.json").read_bytes()) for each in (quiet, output)]
    if states[0]["train"] != states[1]["train"]:
        return f"{output}: counters differ: {states}"
    lines = [read_reproducible_metrics(each) for each in (quiet, output)]
    if lines[0] != lines[1]:
        wrong = [(a, b) for a, b in zip(*lines, strict=False) if a != b]
        return f"{output}: metrics.jsonl has {len(lines[1])} lines, not {len(lines[0])}, or differs: {wrong[:3]}"
    return None


def summary(
    seed: int, tally: Tally, num_runs: int, num_equal: int, seconds: float, failure: str | None
) -> dict[str, Any]:
    """Return the record of one drill."""
    plain = dict(vars(tally))
    down = plain.pop("seconds_down")
    return {
        "date": datetime.date.today().isoformat(),
        "seed": seed,
        "commit": commit(),
        "load_average": machine()["load_average"],
        "seconds": round(seconds, 1),
        "faults_total": tally.faults.total(),
        **{name: dict(sorted(value.items())) if isinstance(value, dict) else value for name, value in plain.items()},
        "median_seconds_to_next_step": round(statistics.median(down), 2) if down else None,
        "runs": num_runs,
        "runs_equal_to_the_bit": num_equal,
        "failure": failure.splitlines()[0] if failure else None,
    }


def commit() -> str:
    """Return the commit of this code, with "+" if there are uncommitted changes."""
    done = subprocess.run(
        ["git", "describe", "--always", "--dirty=+"],
        check=False,
        capture_output=True,
        text=True,
        cwd=Path(__file__).parent,
    )
    return done.stdout.strip() or "unknown"


def write_ledger(drill: dict[str, Any]) -> None:
    """Add a drill and its numbers to results/soak.json."""
    path = RESULTS / "soak.json"
    drills = [*(json.loads(path.read_text())["drills"] if path.exists() else []), drill]
    totals: dict[str, Any] = {"drills": len(drills)}
    for name in ("faults_total", "lives", "recoveries", "steps_done", "steps_lost", "passed_over", "launcher_kills"):
        totals[name] = sum(each[name] for each in drills)
    totals["most_steps_lost"] = max(each["most_steps_lost"] for each in drills)
    for name in ("faults", "missed"):
        kinds = sorted({kind for each in drills for kind in each[name]})
        totals[name] = {kind: sum(each[name].get(kind, 0) for each in drills) for kind in kinds}
    for name in ("runs", "runs_equal_to_the_bit"):
        totals[name] = sum(each[name] for each in drills)
    totals["hours"] = round(sum(each["seconds"] for each in drills) / 3600, 2)
    job = {"processes": NUM_RANKS, "steps": STEPS, "checkpoint_every": EVERY, "keep": KEEP, "run": RUN}
    write_result("soak", {"machine": machine(), "job": job, "totals": totals, "drills": drills})
    print(json.dumps(totals, indent=2))


if __name__ == "__main__":
    raise SystemExit(main())
