"""Comparison of the nodes of one run: software, GPUs, run.yaml, data, clocks."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import orjson

from megatron_cpt.config.launcher import read_launcher
from megatron_cpt.doctor.diagnosis import Diagnosis, Level, passed
from megatron_cpt.doctor.software import Software

if TYPE_CHECKING:
    from megatron_cpt.prepare import PreparedRun

_MAX_SKEW = 2.0  # seconds; the measured skew includes the latency of one message


@dataclass(frozen=True)
class Node:
    """Facts in which the nodes of a run should agree.

    Attributes:
        gpus: name of each GPU.
        run: (name, hash) of run.yaml with its overrides and of each source's files; None without a run.
        clock: seconds since the epoch, read on all nodes at the same moment.
    """

    host: str
    software: Software
    gpus: tuple[str, ...]
    run: tuple[tuple[str, str], ...] | None
    clock: float = 0.0


def run_hashes(prepared: PreparedRun) -> tuple[tuple[str, str], ...]:
    """Return the value of `Node.run`."""
    from megatron_cpt.data.tokenfile.fingerprint import fingerprint
    from megatron_cpt.data.tokenfile.listed_documents import open_dataset

    config = hashlib.sha256(orjson.dumps(prepared.config.to_dict(), option=orjson.OPT_SORT_KEYS)).hexdigest()
    data = {
        name: fingerprint([open_dataset(prefix) for prefix in prefixes]) for name, prefixes in prepared.prefixes.items()
    }
    return (("run.yaml", config), *sorted(data.items()))


@contextmanager
def connect_ranks(timeout: float = 300.0) -> Iterator[int]:
    """Open a gloo process group of the launcher's ranks; yield their number, 1 without a launcher."""
    size = read_launcher().world_size
    if size == 1:
        yield 1
        return
    import torch.distributed as dist

    dist.init_process_group("gloo", timeout=timedelta(seconds=timeout))
    try:
        yield size
    finally:
        dist.destroy_process_group()


def gather(value: Any, num_ranks: int) -> list[Any]:
    """Return the value of each rank; a collective call. One rank needs no torch."""
    if num_ranks == 1:
        return [value]
    import torch.distributed as dist

    values: list[Any] = [None] * num_ranks
    dist.all_gather_object(values, value)
    return values


def read_clocks(num_ranks: int) -> list[float]:
    """Return the time of each rank, read right after a barrier; a collective call."""
    if num_ranks > 1:
        import torch.distributed as dist

        dist.barrier()
    return [float(clock) for clock in gather(time.time(), num_ranks)]


def check_alike(nodes: Sequence[Node]) -> list[Diagnosis]:
    """Compare the nodes; one node gives no findings."""
    if len(nodes) < 2:
        return []
    return [_compare_software(nodes), _compare_gpus(nodes), _compare_runs(nodes), _compare_clocks(nodes)]


def _compare_software(nodes: Sequence[Node]) -> Diagnosis:
    first = asdict(nodes[0].software)
    differing = [
        f"{node.host}: {name} {value} instead of {first[name]}"
        for node in nodes[1:]
        for name, value in asdict(node.software).items()
        if value != first[name]
    ]
    if differing:
        cost = "ranks may compute different numbers, and collectives or checkpoints may be incompatible"
        return Diagnosis(
            "same programs", Level.BLOCKS, "; ".join(differing), cost, "use one container or environment on all nodes"
        )
    return passed("same programs", f"on {len(nodes)} nodes")


def _compare_gpus(nodes: Sequence[Node]) -> Diagnosis:
    differing = [
        f"{node.host}: {_kinds(node)} instead of {_kinds(nodes[0])}" for node in nodes if node.gpus != nodes[0].gpus
    ]
    if differing:
        cost = "every rank waits for the slowest GPU, and the smallest memory limits all"
        return Diagnosis(
            "same GPUs", Level.WARNING, "; ".join(differing), cost, "request one kind from the scheduler (--constraint)"
        )
    return passed("same GPUs", _kinds(nodes[0]))


def _compare_runs(nodes: Sequence[Node]) -> Diagnosis:
    if any(node.run is None for node in nodes):
        return Diagnosis("same run", Level.NOTE, "not compared: no run.yaml was given, or it has problems")
    first = dict(nodes[0].run or ())
    differing = [
        f"{node.host}: {name}"
        for node in nodes
        for name, value in dict(node.run or ()).items()
        if first.get(name) != value
    ]
    if differing:
        cost = f"differs from {nodes[0].host}: ranks would read different text or train different models"
        return Diagnosis(
            "same run", Level.BLOCKS, "; ".join(differing), cost, "put run.yaml and the data on shared storage"
        )
    return passed("same run", f"run.yaml and {len(first) - 1} sources, by hash")


def _compare_clocks(nodes: Sequence[Node]) -> Diagnosis:
    earliest, latest = (pick(nodes, key=lambda node: node.clock) for pick in (min, max))
    skew = latest.clock - earliest.clock
    if skew > _MAX_SKEW:
        found = f"{latest.host} is {skew:.1f} s ahead of {earliest.host}"
        cost = "log lines cannot be ordered, and file times on shared storage are wrong"
        return Diagnosis("same time", Level.WARNING, found, cost, "start chrony or ntpd on these nodes")
    return passed("same time", f"within {skew:.2g} s")


def _kinds(node: Node) -> str:
    return f"{len(node.gpus)} x {node.gpus[0]}" if node.gpus else "none"
