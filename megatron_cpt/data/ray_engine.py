"""Ray as an engine: the pieces of a job run as Ray tasks, and their results come back in order.

Only tasks of Ray's core are used, not Ray Data: a job's reader cuts the input, its writer needs the results in the
order of the input, and both exist already. So the result has the same bytes as without Ray.
"""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import shutil
import socket
import sys
import tempfile
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from megatron_cpt.errors import CptError, UserError

T = TypeVar("T")
R = TypeVar("R")

_RETRIES = 3  # of a piece whose worker process or node died
_STARTS = 3  # Ray gives up on a node of its own whose helper processes need more than 15 s (ray-project/ray#65983)
_CONNECT_SECONDS = 30
_LEAST_STORE = 128 << 20
_LOCAL_SETTINGS = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # on every system: listen on the loopback address alone
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}


class RayFailedError(CptError):
    """Ray could not start, or lost the worker of a piece too often; saved progress is kept."""


@dataclass(frozen=True)
class RayCluster:
    """Connection to a cluster; see `connect_ray`.

    Attributes:
        num_cpus: CPUs to use.
    """

    num_cpus: int

    def map_in_order(
        self, function: Callable[..., R], items: Iterable[T], common: Sequence[Any], *, in_flight: int
    ) -> Generator[R, None, None]:
        """Yield function(item, *common) of each item, in the order of the items; each call is a task of one CPU.

        A piece whose worker dies is run again, so the function must have the same result each time. It is found by its
        name on every node. An error of the function is raised here.

        Args:
            common: values that all tasks need; they are sent to a node once.
            in_flight: items that are handed out at a time; bounds memory.

        Raises:
            RayFailedError: the worker of an item died too often, or a node could not run the function.
        """
        import ray

        task = ray.remote(function).options(max_retries=_RETRIES, num_cpus=1)
        shared = [ray.put(value) for value in common]
        pending: deque[Any] = deque()
        for item in items:
            pending.append(task.remote(item, *shared))
            if len(pending) >= in_flight:
                yield _result(pending.popleft())
        while pending:
            yield _result(pending.popleft())


@contextlib.contextmanager
def connect_ray(
    address: str | None, *, num_cpus: int | None, num_gpus: int | None = 0, bytes_per_cpu: int = 0
) -> Iterator[RayCluster]:
    """Connect to a cluster, or start one on this machine and stop it at the end.

    The cluster of this machine has no dashboard, listens on the loopback address with a token of its own, and leaves no
    files. If the process is connected to Ray already, that cluster is used and stays.

    Args:
        address: as `ray.init` takes it, such as `head:6379` or `auto`; None: start a cluster.
        num_cpus: CPUs to use; None: all of the cluster or machine.
        num_gpus: GPUs of a cluster that is started; None: all of the machine.
        bytes_per_cpu: size of the object store of a cluster that is started, per CPU.

    Raises:
        UserError: there is no cluster at the address.
        RayFailedError: no cluster could be started.
        ModuleNotFoundError: Ray is not installed.
    """
    with contextlib.ExitStack() as stack:
        if address is None:
            _set_environment(stack)
        import ray

        if not ray.is_initialized():
            stack.callback(ray.shutdown)
            if address is None:
                folder = tempfile.mkdtemp(prefix="cpt-ray-")
                stack.callback(shutil.rmtree, folder, ignore_errors=True)
                stack.callback(ray.shutdown)  # before its folder is removed
                cpus = num_cpus or len(os.sched_getaffinity(0))
                _start(cpus, num_gpus, max(cpus * bytes_per_cpu, _LEAST_STORE), folder)
            else:
                _join(address)
        found = int(ray.cluster_resources().get("CPU", 1))
        yield RayCluster(num_cpus or found)


def _set_environment(stack: contextlib.ExitStack) -> None:
    """Set the environment of a cluster that is started, until the stack closes; the token stays."""
    # Without a token Ray writes one to the home folder. It reads mode and token once per process, when it is imported.
    if "RAY_AUTH_MODE" not in os.environ and "ray" not in sys.modules:
        os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    before = {name: os.environ.get(name) for name in _LOCAL_SETTINGS}

    def restore() -> None:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value

    stack.callback(restore)
    os.environ.update(_LOCAL_SETTINGS)


def _start(num_cpus: int, num_gpus: int | None, store_bytes: int, folder: str) -> None:
    import ray

    for start in range(1, _STARTS + 1):
        try:
            ray.init(
                address="local",
                num_cpus=num_cpus,
                num_gpus=num_gpus,
                object_store_memory=store_bytes,
                include_dashboard=False,
                log_to_driver=False,
                logging_level=logging.CRITICAL,
                _temp_dir=folder,
                _node_ip_address="127.0.0.1",
            )
            return
        except Exception as error:  # Ray raises a plain Exception if its processes do not come up
            ray.shutdown()
            if start == _STARTS:
                raise RayFailedError(
                    f"Ray did not start in {_STARTS} attempts: {_first_line(error)}; the machine may be too busy: try "
                    "again, use --engine local, or name a running cluster with --ray-address"
                ) from error


def _join(address: str) -> None:
    import ray

    host, _, port = address.rpartition("://")[2].rpartition(":")
    try:
        if port.isdecimal():  # Ray itself waits for minutes
            socket.create_connection((host, int(port)), _CONNECT_SECONDS).close()
        ray.init(address=address, log_to_driver=False, logging_level=logging.CRITICAL)
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(
            f"--ray-address {address}: no connection to a Ray cluster: {_first_line(error)}; start it with "
            "`ray start --head`, and give the address that it prints"
        ) from error


def _result(reference: Any) -> Any:
    import ray
    from ray.exceptions import RayError, RayTaskError

    try:
        return ray.get(reference)
    except RayTaskError as error:
        cause = error.cause
        if isinstance(cause, Exception) and not isinstance(cause, RayError):
            raise cause from error
        raise RayFailedError(f"Ray: {_first_line(error)}") from error
    except RayError as error:
        raise RayFailedError(
            f"Ray: {_first_line(error)}; a worker died more than {_RETRIES} times, or a node lacks this version of "
            "megatron-cpt; run the same command again to resume"
        ) from error


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def enter_folder(folder: str) -> None:
    """Make a folder of the job's own machine the working directory of a task, so that relative paths work.

    Raises:
        UserError: this node does not have the folder.
    """
    if os.getcwd() == folder:
        return
    if not Path(folder).is_dir():
        raise UserError(
            f"{folder}: no such folder on node {os.uname().nodename}; every node of the Ray cluster needs it"
        )
    os.chdir(folder)
