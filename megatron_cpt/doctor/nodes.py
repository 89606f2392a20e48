"""Several nodes of one run: do they have the same programs, the same run, the same data, the same time?"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import orjson

from megatron_cpt.doctor.diagnosis import Diagnosis, Level, passed
from megatron_cpt.doctor.software import Software

if TYPE_CHECKING:
    from megatron_cpt.prepare import PreparedRun

_MAX_SKEW = 2.0  # seconds; what is measured holds the way of one message, too


@dataclass(frozen=True)
class Node:
    """What nodes are compared by.

    Attributes:
        host: its name.
        software: its programs.
        gpus: their kinds.
        run: hashes of the run.yaml with its overrides, and of each source's files; None without a run.
        clock: its time, in seconds, when all were asked at once.
    """

    host: str
    software: Software
    gpus: tuple[str, ...]
    run: tuple[tuple[str, str], ...] | None
    clock: float = 0.0


def run_hashes(prepared: PreparedRun) -> tuple[tuple[str, str], ...]:
    """See `Node.run`."""
    from megatron_cpt.data import IndexedDataset
    from megatron_cpt.data.tokenfile.fingerprint import fingerprint

    config = hashlib.sha256(orjson.dumps(prepared.config.to_dict(), option=orjson.OPT_SORT_KEYS)).hexdigest()
    data = {
        name: fingerprint([IndexedDataset(prefix) for prefix in prefixes])
        for name, prefixes in prepared.prefixes.items()
    }
    return (("run.yaml", config), *sorted(data.items()))


@contextmanager
def meeting(timeout: float = 300.0) -> Iterator[int]:
    """The launcher's ranks come together over gloo; yields their number, 1 without a launcher."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield 1
        return
    import torch.distributed as dist

    dist.init_process_group("gloo", timeout=timedelta(seconds=timeout))
    try:
        yield size
    finally:
        dist.destroy_process_group()


def gather(value: Any) -> list[Any]:
    """Everybody's value, by rank; a collective call."""
    import torch.distributed as dist

    if not dist.is_initialized():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def clocks() -> list[float]:
    """Everybody's time, taken at once as near as a barrier allows; a collective call."""
    import torch.distributed as dist

    dist.barrier()
    return [float(clock) for clock in gather(time.time())]


def check_alike(nodes: Sequence[Node]) -> list[Diagnosis]:
    """Whether nodes differ in what must be the same."""
    if len(nodes) < 2:
        return []
    return [_software(nodes), _gpus(nodes), _run(nodes), _time(nodes)]


def _software(nodes: Sequence[Node]) -> Diagnosis:
    first = asdict(nodes[0].software)
    differing = [
        f"{node.host}: {name} {value} instead of {first[name]}"
        for node in nodes[1:]
        for name, value in asdict(node.software).items()
        if value != first[name]
    ]
    if differing:
        cost = "ranks may disagree on numbers, on messages and on what a checkpoint is"
        return Diagnosis(
            "same programs", Level.BLOCKS, "; ".join(differing), cost, "one container, or one environment, for all"
        )
    return passed("same programs", f"on {len(nodes)} nodes")


def _gpus(nodes: Sequence[Node]) -> Diagnosis:
    differing = [
        f"{node.host}: {_kinds(node)} instead of {_kinds(nodes[0])}" for node in nodes if node.gpus != nodes[0].gpus
    ]
    if differing:
        cost = "all wait for the slowest, and the smallest memory counts"
        return Diagnosis(
            "same GPUs", Level.WARNING, "; ".join(differing), cost, "ask the scheduler for one kind (--constraint)"
        )
    return passed("same GPUs", _kinds(nodes[0]))


def _run(nodes: Sequence[Node]) -> Diagnosis:
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
        cost = f"other than on {nodes[0].host}: ranks would read other text, or train another model"
        return Diagnosis(
            "same run", Level.BLOCKS, "; ".join(differing), cost, "put run.yaml and data where all nodes see them"
        )
    return passed("same run", f"run.yaml and {len(first) - 1} sources, by hash")


def _time(nodes: Sequence[Node]) -> Diagnosis:
    earliest, latest = (pick(nodes, key=lambda node: node.clock) for pick in (min, max))
    skew = latest.clock - earliest.clock
    if skew > _MAX_SKEW:
        found = f"{latest.host} is {skew:.1f} s ahead of {earliest.host}"
        cost = "logs cannot be put in order, and shared storage may take new files for old ones"
        return Diagnosis("same time", Level.WARNING, found, cost, "start chrony or ntpd there")
    return passed("same time", f"within {skew:.2g} s")


def _kinds(node: Node) -> str:
    return f"{len(node.gpus)} x {node.gpus[0]}" if node.gpus else "none"
