"""examples/nemotron4_15b on a simulated cluster: its run.yaml and scripts, with overrides for a small model.

Two nodes of two ranks each, TP (tensor parallelism) 2 x PP (pipeline) 2, a rendezvous of two torchrun agents,
asynchronous checkpoints.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.helpers.checkpoints import differing
from tests.helpers.runs import newest, read_metrics, write_source
from tests.helpers.slurm import Slurm, free_port, wait_for_lines

EXAMPLE = Path(__file__).parents[2] / "examples" / "nemotron4_15b"
STEPS = 30
SMALL = [
    "model.layers=4",
    "model.hidden=64",
    "model.ffn_hidden=128",
    "model.heads=8",
    "model.kv_groups=4",
    "model.head_dim=8",
    "model.vocab=257",
    "model.max_positions=32",
    "tokenizer=byte",
    "init={}",
    "seq_length=32",
    "batch.global=8",
    f"tokens={STEPS * 8 * 32}",
    "parallel.tensor=2",
    "parallel.pipeline=2",
    "parallel.virtual_pipeline=2",
    "parallel.pipeline_layout=[2, 1, 1, 0]",  # unequal, as in the example
    "checkpoint.every=10",
    "validation.every=null",
    "validation.batches=1",
    "log.every=1",
]


@pytest.fixture(scope="module")
def overrides(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Return overrides for a small run, and write data for each source."""
    folder = tmp_path_factory.mktemp("data")
    run = yaml.safe_load((EXAMPLE / "run.yaml").read_text())
    changed = list(SMALL)
    for stride, name in enumerate(run["sources"], start=1):
        write_source(folder / name, stride=stride)
        changed += [f"sources.{name}.path={folder / name}", f"sources.{name}.tokens=null"]
    for stride, name in enumerate(run["validation"]["sources"], start=1):
        write_source(folder / "validation" / name, stride=stride, documents=10, seed=1)
        changed.append(f"validation.sources.{name}={folder / 'validation' / name}")
    return changed


def _environment(**variables: str) -> dict[str, str]:
    return {
        "GPUS": "2",
        "PYTHON": sys.executable,
        "PORT": free_port(),
        "PYTHONPATH": str(EXAMPLE.parents[1]),
        "OMP_NUM_THREADS": "1",
        **variables,
    }


def _train_on_two_nodes(folder: Path, arguments: list[str], **variables: str) -> list[int]:
    """Start `train.sh` on each node, as a user would by hand."""
    environment = {**os.environ, **_environment(NODES="2", HEAD="localhost", JOB="by-hand", **variables)}
    nodes = [
        subprocess.Popen(
            [str(EXAMPLE / "train.sh"), *arguments],
            cwd=folder,
            env={**environment, "NODE_RANK": str(rank), "LOG_DIR": str(folder / f"logs-{rank}")},
            stdout=(folder / f"node-{rank}.log").open("wb"),
            stderr=subprocess.STDOUT,
        )
        for rank in (1, 0)  # the node with the rendezvous starts last, which can happen
    ]
    return [node.wait(timeout=1800) for node in nodes]


@pytest.mark.long
def test_preempted_and_requeued_by_slurm_it_ends_where_an_unbroken_run_does(
    tmp_path: Path, overrides: list[str]
) -> None:
    unbroken = tmp_path / "unbroken"
    statuses = _train_on_two_nodes(tmp_path, [*overrides, f"output={unbroken}"])
    assert statuses == [0, 0], (tmp_path / "node-0.log").read_text()
    for rank, node in enumerate((0, 0, 1, 1)):  # one file per rank, and all lines in the log of the node
        (log,) = (tmp_path / f"logs-{node}").glob(f"*/attempt_0/{rank % 2}/stderr.log")
        assert (tmp_path / f"node-{node}.log").read_text().count("[rank ") >= log.read_text().count("\n")

    job = Slurm(tmp_path / "job", EXAMPLE / "train.sbatch", num_nodes=2)
    output = tmp_path / "preempted"
    variables = {**_environment(), "EXAMPLE": str(EXAMPLE)}
    batch = job.start([*overrides, f"output={output}"], **variables)
    wait_for_lines(output / "metrics.jsonl", 4, batch)
    assert job.signal_step(batch, signal.SIGUSR1) >= 8  # two launchers, two agents, four ranks
    assert batch.wait(timeout=1800) == 75, job.output()
    assert job.was_requeued() == 1
    stopped_at = int(newest(output).name.removeprefix("step-"))
    assert 3 <= stopped_at < STEPS

    batch = job.start([*overrides, f"output={output}"], **variables)
    assert batch.wait(timeout=1800) == 0, job.output()
    assert job.was_requeued() == 1
    assert newest(output).name == f"step-{STEPS:08d}"
    assert differing(newest(unbroken), newest(output)) == []
    steps = [line["step"] for line in read_metrics(output)]
    assert steps == list(range(1, STEPS + 1))


@pytest.mark.long
def test_a_job_that_was_canceled_saves_and_stays_ended(tmp_path: Path, overrides: list[str]) -> None:
    job = Slurm(tmp_path / "job", EXAMPLE / "train.sbatch", num_nodes=2)
    job.state = "Canceled"
    output = tmp_path / "out"
    batch = job.start([*overrides, f"output={output}"], **{**_environment(), "EXAMPLE": str(EXAMPLE)})
    wait_for_lines(output / "metrics.jsonl", 2, batch)
    job.signal_step(batch, signal.SIGTERM)
    assert batch.wait(timeout=1800) == 75, job.output()
    assert job.was_requeued() == 0
    assert newest(output).exists()


@pytest.mark.long
def test_too_few_nodes_are_one_message_and_no_restart(tmp_path: Path, overrides: list[str]) -> None:
    log = tmp_path / "log"
    with log.open("wb") as file:
        done = subprocess.run(
            [str(EXAMPLE / "train.sh"), *overrides, f"output={tmp_path / 'out'}"],
            cwd=tmp_path,
            env={**os.environ, **_environment(NODES="1")},
            stdout=file,
            stderr=subprocess.STDOUT,
            timeout=1800,
            check=False,
        )
    text = log.read_text()
    assert done.returncode == 2, text
    assert "parallel.tensor x pipeline x context" in text
    assert "attempt 1" not in text
    assert "RuntimeWarning" not in text
    assert not (tmp_path / "out").exists()
