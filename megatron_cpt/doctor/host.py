"""The node itself: limits, shared memory, names, network cards, the rendezvous port."""

from __future__ import annotations

import resource
import shutil
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_cpt.doctor.diagnosis import Diagnosis, Level, passed

_GIB = 2**30
_MIN_FILES = 65536  # two a data file (.bin, .idx), a socket a peer, in every rank
_MIN_SHM = 4 * _GIB  # what NCCL and a loader's processes share; a container has 64 MiB where nothing is said
_INFINIBAND = Path("/sys/class/infiniband")


@dataclass(frozen=True)
class Port:
    """A port of a network card.

    Attributes:
        card: `mlx5_0`.
        state: `ACTIVE`, `DOWN`, ...
        rate: `400 Gb/sec (4X NDR)`.
        kind: `InfiniBand` or `Ethernet` (RoCE).
    """

    card: str
    state: str
    rate: str
    kind: str


def read_ports(folder: Path = _INFINIBAND) -> tuple[Port, ...]:
    """Ports that can do RDMA, by the kernel's own list."""
    found = []
    for port in sorted(folder.glob("*/ports/*")):
        state, rate, kind = ((port / name).read_text().strip() for name in ("state", "rate", "link_layer"))
        found.append(Port(port.parent.parent.name, state.partition(": ")[2] or state, rate, kind))
    return tuple(found)


def check_ports(ports: Sequence[Port], *, num_nodes: int) -> Diagnosis:
    """Cards for traffic between nodes; only a run on several nodes needs them."""
    name = "InfiniBand"
    if not ports:
        if num_nodes == 1:
            return passed(name, "none, not needed on one node")
        cost = "gradients and pipeline stages go over TCP: many times slower"
        return Diagnosis(name, Level.WARNING, "none", cost, "in a container, give it /dev/infiniband")
    down = [port.card for port in ports if port.state != "ACTIVE"]
    rates = sorted({port.rate for port in ports if port.state == "ACTIVE"})
    found = f"{len(ports) - len(down)} of {len(ports)} ports active, {', '.join(rates) or 'no rate'}"
    if down and num_nodes > 1:
        cost = f"down: {', '.join(down)}; each carries its GPU's share of the traffic"
        return Diagnosis(
            name, Level.WARNING, found, cost, "have the links seen to, or leave the cards out by NCCL_IB_HCA"
        )
    return passed(name, found)


def read_limit(number: int) -> int | None:
    """A limit of this process; None: unlimited."""
    soft, _ = resource.getrlimit(number)
    return None if soft == resource.RLIM_INFINITY else soft


def check_open_files(limit: int | None) -> Diagnosis:
    """Every rank opens all data files, and a socket to many peers."""
    if limit is not None and limit < _MIN_FILES:
        cost = "a run of many data files, or on many nodes, ends with 'Too many open files'"
        return Diagnosis("open files", Level.WARNING, f"{limit:,}", cost, f"ulimit -n {_MIN_FILES}")
    return passed("open files", "unlimited" if limit is None else f"{limit:,}")


def check_locked_memory(limit: int | None, *, has_infiniband: bool) -> Diagnosis:
    """Memory that a card reads and writes by itself must be locked."""
    found = "unlimited" if limit is None else f"{limit / _GIB:.3g} GiB"
    if limit is None or not has_infiniband:
        return passed("locked memory", found)
    cost = "NCCL cannot register its buffers with InfiniBand: it fails ('Cannot allocate memory')"
    way_out = "ulimit -l unlimited (SLURM: PropagateResourceLimitsExcept=MEMLOCK; Docker: --ulimit memlock=-1)"
    return Diagnosis("locked memory", Level.BLOCKS, found, cost, way_out)


def check_shared_memory(size: int | None) -> Diagnosis:
    """Size of /dev/shm in bytes; None: there is none."""
    if size is not None and size >= _MIN_SHM:
        return passed("shared memory", f"{size / _GIB:.3g} GiB")
    found = "no /dev/shm" if size is None else f"{size / _GIB:.3g} GiB"
    cost = "NCCL ends with a bus error where GPUs of a node talk through it"
    return Diagnosis("shared memory", Level.WARNING, found, cost, "Docker: --shm-size 16g, or --ipc host")


def read_shared_memory() -> int | None:
    """Size of /dev/shm in bytes."""
    return shutil.disk_usage("/dev/shm").total if Path("/dev/shm").is_dir() else None


def resolve(name: str) -> str | None:
    """The address of a host; None: it has none here."""
    try:
        return str(socket.getaddrinfo(name, None)[0][4][0])
    except OSError:
        return None


def check_name(name: str, address: str | None, *, num_nodes: int) -> Diagnosis:
    """Whether this host's own name means this host to itself, and to the others."""
    if address is None:
        cost = "torchrun and gloo look it up; they fail, or wait"
        return Diagnosis("host name", Level.BLOCKS, f"{name} has no address", cost, "enter it in DNS or /etc/hosts")
    if address.startswith("127.") and num_nodes > 1:
        cost = "this node tells the others an address that is theirs"
        way_out = "correct /etc/hosts, or name the interface: GLOO_SOCKET_IFNAME, NCCL_SOCKET_IFNAME"
        return Diagnosis("host name", Level.WARNING, f"{name} is {address}", cost, way_out)
    return passed("host name", f"{name} is {address}")


def is_port_free(port: int) -> bool:
    """Whether a server could take a TCP port here."""
    with socket.socket() as server:
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            server.bind(("", port))
        except OSError:
            return False
    return True


def check_port(port: int, *, is_free: bool) -> Diagnosis:
    """The port of the rendezvous, on the node that shall hold it."""
    if is_free:
        return passed("rendezvous port", f"{port} is free")
    cost = "a run that meets there would meet somebody else's"
    return Diagnosis("rendezvous port", Level.WARNING, f"{port} is taken", cost, "another PORT, or end what holds it")
