"""Run all checks of a node, and compare the nodes that a launcher started."""

from __future__ import annotations

import dataclasses
import os
import resource
import shutil
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_cpt.config import ParallelConfig
from megatron_cpt.doctor import disk, host, nodes, software
from megatron_cpt.doctor import gpus as gpu_checks
from megatron_cpt.doctor.diagnosis import Diagnosis, Level, passed
from megatron_cpt.planning.hardware import emulates_bf16


@dataclass(frozen=True)
class Examination:
    """Findings of all nodes.

    Attributes:
        by_host: findings per host, in the order of the nodes.
        together: findings of the comparison of the nodes; empty for one node.
    """

    by_host: dict[str, list[Diagnosis]]
    together: list[Diagnosis]

    @property
    def blocks(self) -> bool:
        """True if a finding keeps a run from starting."""
        return any(finding.level is Level.BLOCKS for finding in self.lines())

    def lines(self) -> list[Diagnosis]:
        """Return all findings of the first node, the problems of the other nodes, then the comparison."""
        (first, findings), *others = self.by_host.items()
        problems = [
            dataclasses.replace(finding, found=f"{name}: {finding.found}")
            for name, found in others
            for finding in found
            if finding.level is not Level.OK and finding not in findings
        ]
        return [passed("node", first), *findings, *problems, *self.together]

    def to_dict(self) -> dict[str, Any]:
        """Return the value that `doctor --json` prints."""
        return {
            "blocks": self.blocks,
            "nodes": {name: [dataclasses.asdict(one) for one in found] for name, found in self.by_host.items()},
            "together": [dataclasses.asdict(finding) for finding in self.together],
        }


def examine(run: str | None, overrides: Sequence[str], *, port: int) -> Examination:
    """Check this node, or all nodes of the launcher; then it is a collective call.

    Args:
        run: path of run.yaml; None: check only the node.
        port: rendezvous port; checked without a launcher, which would be using it.
    """
    with nodes.connect_ranks() as num_ranks:
        is_first_of_node = os.environ.get("LOCAL_RANK", "0") == "0"
        own = _examine_node(run, overrides, port) if is_first_of_node else None
        gathered = [pair for pair in nodes.gather(own, num_ranks) if pair is not None]
        times = nodes.read_clocks(num_ranks)
    seen: list[nodes.Node] = []
    by_host: dict[str, list[Diagnosis]] = {}
    for number, (node, findings) in enumerate(gathered):
        name = node.host if node.host not in by_host else f"{node.host} ({number})"
        by_host[name] = findings
        local_size = num_ranks // len(gathered)
        seen.append(dataclasses.replace(node, host=name, clock=times[number * local_size]))
    return Examination(by_host, nodes.check_alike(seen))


def _examine_node(run: str | None, overrides: Sequence[str], port: int) -> tuple[nodes.Node, list[Diagnosis]]:
    num_nodes = int(os.environ.get("GROUP_WORLD_SIZE", "1"))
    local_size = os.environ.get("LOCAL_WORLD_SIZE")
    installed, found = software.read_software(), gpu_checks.read_gpus()
    has_gpu = bool(found.gpus)
    findings = [
        passed("Python", installed.python),
        *software.check_core(installed),
        software.check_transformer_engine(installed, has_gpu=has_gpu),
        software.check_apex(installed, has_gpu=has_gpu),
        software.check_nccl(installed, has_gpu=has_gpu),
        *gpu_checks.check_gpus(
            found, num_ranks=int(local_size) if local_size else None, num_usable=_count_usable_gpus(installed)
        ),
        *_examine_host(port, num_nodes),
    ]
    hashes = None
    if run is None and not has_gpu:
        findings.append(host.check_bf16("bf16", is_emulated=emulates_bf16()))
    if run is not None:
        hashes, of_run = _examine_run(run, overrides, len(found.gpus), num_nodes)
        findings += of_run
    return nodes.Node(socket.gethostname(), installed, tuple(gpu.name for gpu in found.gpus), hashes), findings


def _examine_host(port: int, num_nodes: int) -> list[Diagnosis]:
    name, ports = socket.gethostname(), host.read_ports()
    findings = [
        host.check_ports(ports, num_nodes=num_nodes),
        host.check_open_files(host.read_limit(resource.RLIMIT_NOFILE)),
        host.check_locked_memory(host.read_limit(resource.RLIMIT_MEMLOCK), has_infiniband=bool(ports)),
        host.check_shared_memory(shutil.disk_usage("/dev/shm").total if Path("/dev/shm").is_dir() else None),
        host.check_name(name, host.resolve(name), num_nodes=num_nodes),
    ]
    if num_nodes == 1:
        findings.append(host.check_port(port, is_free=host.is_port_free(port)))
    return findings


def _examine_run(
    run: str, overrides: Sequence[str], num_gpus: int, num_nodes: int
) -> tuple[tuple[tuple[str, str], ...] | None, list[Diagnosis]]:
    prepared, finding = disk.read_run(run, overrides)
    if prepared is None:
        return None, [finding]
    config = prepared.config
    measured = disk.try_disk(Path(config.output))
    size = disk.checkpoint_bytes(prepared)
    findings = [finding, disk.check_output(config.output, measured)]
    if measured.problem is None:
        writers = max(num_gpus * num_nodes, config.parallel.model_parallel_size)
        findings.append(disk.check_space(size, disk.num_checkpoints(prepared), measured.free))
        findings.append(disk.check_save_time(size, measured, writers))
    if num_gpus:
        findings.append(check_layout(config.parallel, num_gpus, num_nodes))
    else:
        findings.append(host.check_bf16(config.precision.compute, is_emulated=emulates_bf16()))
    return nodes.run_hashes(prepared), findings


def check_layout(parallel: ParallelConfig, num_gpus: int, num_nodes: int) -> Diagnosis:
    """Check that all GPUs (`num_gpus` per node) hold whole replicas, and a node a whole tensor-parallel group."""
    replica, total = parallel.model_parallel_size, num_gpus * num_nodes
    found = f"a replica takes {replica} GPUs; the job has {total}"
    if total % replica:
        way_out = f"start a multiple of {replica}, or change parallel (`megatron-cpt plan --advise`)"
        return Diagnosis("layout", Level.BLOCKS, found, "the job is no multiple of a replica", way_out)
    if parallel.tensor > num_gpus:
        cost = f"tensor {parallel.tensor} spans nodes of {num_gpus} GPUs: its traffic leaves NVLink"
        return Diagnosis("layout", Level.WARNING, found, cost, f"set parallel.tensor={num_gpus} or less")
    return passed("layout", found)


def _count_usable_gpus(installed: software.Software) -> int:
    if installed.cuda is None:
        return 0
    import torch

    return torch.cuda.device_count()
