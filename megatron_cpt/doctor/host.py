"""Checks of a node: limits, shared memory, host name, network cards, the rendezvous port."""

from __future__ import annotations

import resource
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_cpt.doctor.diagnosis import Diagnosis, Level, passed
from megatron_cpt.files.whole_io import read_text

_GIB = 2**30
_MIN_FILES = 65536  # each rank opens two files per dataset (.bin, .idx) and one socket per peer
_MIN_SHM = 4 * _GIB  # shared by NCCL and data loader processes; Docker's default is 64 MiB
_INFINIBAND = Path("/sys/class/infiniband")


@dataclass(frozen=True)
class Port:
    """Port of a network card, such as `mlx5_0`, `ACTIVE`, `400 Gb/sec (4X NDR)`, `InfiniBand` (`Ethernet`: RoCE)."""

    card: str
    state: str
    rate: str
    kind: str


def read_ports(folder: Path = _INFINIBAND) -> tuple[Port, ...]:
    """List the ports that support RDMA, as the kernel reports them."""
    found = []
    for port in sorted(folder.glob("*/ports/*")):
        state, rate, kind = (read_text(port / name).strip() for name in ("state", "rate", "link_layer"))
        found.append(Port(port.parent.parent.name, state.partition(": ")[2] or state, rate, kind))
    return tuple(found)


def check_ports(ports: Sequence[Port], *, num_nodes: int) -> Diagnosis:
    """Check the network cards; only a run on several nodes needs them."""
    name = "InfiniBand"
    if not ports:
        if num_nodes == 1:
            return passed(name, "none, not needed on one node")
        cost = "traffic between nodes uses TCP: many times slower"
        return Diagnosis(name, Level.WARNING, "none", cost, "in a container, pass /dev/infiniband to it")
    down = [port.card for port in ports if port.state != "ACTIVE"]
    rates = sorted({port.rate for port in ports if port.state == "ACTIVE"})
    found = f"{len(ports) - len(down)} of {len(ports)} ports active, {', '.join(rates) or 'no rate'}"
    if down and num_nodes > 1:
        cost = f"down: {', '.join(down)}; the GPUs of these cards lose bandwidth"
        return Diagnosis(name, Level.WARNING, found, cost, "repair the links, or exclude the cards with NCCL_IB_HCA")
    return passed(name, found)


def check_bf16(compute: str, *, is_emulated: bool) -> Diagnosis:
    """Check that a run without a GPU does not use bf16 on a CPU that emulates it.

    Args:
        compute: `precision.compute` of the run.
    """
    if not is_emulated:
        return passed("CPU", "computes in bf16")
    if compute != "bf16":
        return passed("CPU", f"emulates bf16; the run uses {compute}")
    cost = "precision.compute: bf16, the default, is several times slower than fp32 here"
    return Diagnosis("CPU", Level.NOTE, "emulates bf16", cost, "set precision.compute=fp32 to train on this CPU")


def read_limit(number: int) -> int | None:
    """Return a soft limit of this process; None: unlimited."""
    soft, _ = resource.getrlimit(number)
    return None if soft == resource.RLIM_INFINITY else soft


def check_open_files(limit: int | None) -> Diagnosis:
    """Check the limit of open files."""
    if limit is not None and limit < _MIN_FILES:
        cost = "a run with many data files or nodes fails with 'Too many open files'"
        return Diagnosis("open files", Level.WARNING, f"{limit:,}", cost, f"ulimit -n {_MIN_FILES}")
    return passed("open files", "unlimited" if limit is None else f"{limit:,}")


def check_locked_memory(limit: int | None, *, has_infiniband: bool) -> Diagnosis:
    """Check the limit of locked memory: InfiniBand cards access only locked memory."""
    found = "unlimited" if limit is None else f"{limit / _GIB:.3g} GiB"
    if limit is None or not has_infiniband:
        return passed("locked memory", found)
    cost = "NCCL cannot register its buffers with InfiniBand: it fails ('Cannot allocate memory')"
    way_out = "ulimit -l unlimited (SLURM: PropagateResourceLimitsExcept=MEMLOCK; Docker: --ulimit memlock=-1)"
    return Diagnosis("locked memory", Level.BLOCKS, found, cost, way_out)


def check_shared_memory(size: int | None) -> Diagnosis:
    """Check the size of /dev/shm in bytes; None: /dev/shm does not exist."""
    if size is not None and size >= _MIN_SHM:
        return passed("shared memory", f"{size / _GIB:.3g} GiB")
    found = "no /dev/shm" if size is None else f"{size / _GIB:.3g} GiB"
    cost = "NCCL crashes with a bus error if the GPUs of a node use it to communicate"
    return Diagnosis("shared memory", Level.WARNING, found, cost, "Docker: --shm-size 16g, or --ipc host")


def resolve(name: str) -> str | None:
    """Return the IP address of a host; None if the name cannot be resolved."""
    try:
        return str(socket.getaddrinfo(name, None)[0][4][0])
    except OSError:
        return None


def check_name(name: str, address: str | None, *, num_nodes: int) -> Diagnosis:
    """Check that this host's name resolves to an address that other nodes can use."""
    if address is None:
        cost = "torchrun and gloo resolve the name; they fail or time out"
        return Diagnosis("host name", Level.BLOCKS, f"{name} has no address", cost, "add it to DNS or /etc/hosts")
    if address.startswith("127.") and num_nodes > 1:
        cost = "other nodes would connect to themselves"
        way_out = "correct /etc/hosts, or set GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME to the interface"
        return Diagnosis("host name", Level.WARNING, f"{name} is {address}", cost, way_out)
    return passed("host name", f"{name} is {address}")


def is_port_free(port: int) -> bool:
    """Return True if a server could listen on a TCP port."""
    with socket.socket() as server:
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            server.bind(("", port))
        except OSError:
            return False
    return True


def check_port(port: int, *, is_free: bool) -> Diagnosis:
    """Check the rendezvous port on the node that holds it."""
    if is_free:
        return passed("rendezvous port", f"{port} is free")
    cost = "the ranks would connect to another job"
    way_out = "choose another port, or stop the process that uses it"
    return Diagnosis("rendezvous port", Level.WARNING, f"{port} is taken", cost, way_out)
