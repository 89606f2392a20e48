"""NVIDIA's resiliency extension: reports of slow GPUs, and heartbeats for its launcher.

Written against nvidia-resiliency-ext 0.4.1 (`straggler.Detector`, `fault_tolerance.RankMonitorClient`).
"""

from __future__ import annotations

import contextlib
import logging
import os
from typing import TYPE_CHECKING, Any

from megatron_cpt.errors import UserError, install_command
from megatron_cpt.hooks.hook import Hook

if TYPE_CHECKING:
    from megatron_cpt.train.setup import Session

logger = logging.getLogger(__name__)

_REPORT_SECONDS = 300.0
_MONITOR_SOCKET = "FT_RANK_MONITOR_IPC_SOCKET"  # set by `ft_launcher`
_SLOW = 0.75  # share of the fastest rank's speed, or of this rank's own best speed, below which a rank is slow


class StragglerHook(Hook):
    """Detector of ranks whose kernels are slower than on other ranks, or slower than before.

    Under NVIDIA's `ft_launcher` each step also sends a heartbeat to the launcher, which then detects hangs as well.

    Raises:
        UserError: the package is not installed, or the machine has no GPU to measure.
    """

    def __init__(self) -> None:
        import torch

        if not torch.cuda.is_available():
            raise UserError("resilience.straggler: measures CUDA kernels, and this machine has no GPU; remove it")
        try:
            from nvidia_resiliency_ext import straggler
        except ImportError as error:
            raise UserError(
                f"resilience.straggler: the package is not installed; {install_command('resiliency')}"
            ) from error
        self._detector = straggler.Detector
        self._section = contextlib.ExitStack()
        self._monitor: Any = None

    def on_start(self, session: Session) -> None:
        """Start the detector; it measures from the end of one step to the end of the next."""
        self._detector.initialize(
            gather_on_rank0=True, profiling_interval=session.config.log.every, report_time_interval=_REPORT_SECONDS
        )
        if _MONITOR_SOCKET in os.environ:
            from nvidia_resiliency_ext.fault_tolerance import RankMonitorClient

            self._monitor = RankMonitorClient()
            self._monitor.init_workload_monitoring()
        self._begin_section()

    def on_step(self, session: Session) -> None:
        """End the measurement of this step, report every few minutes, and begin the next measurement."""
        self._section.close()
        if self._monitor is not None:
            self._monitor.send_heartbeat()
        report = self._detector.generate_report_if_interval_elapsed()
        if report is not None and session.ranks.is_main:
            for line in slow_ranks(report.identify_stragglers(gpu_rel_threshold=_SLOW, gpu_indiv_threshold=_SLOW)):
                logger.warning("step %d: %s", session.state.step, line)
        self._begin_section()

    def on_end(self, session: Session) -> None:
        """Stop the detector and the heartbeats."""
        if self._detector.initialized:
            self._section.close()
            self._detector.shutdown()
        if self._monitor is not None:
            self._monitor.shutdown_workload_monitoring()

    def _begin_section(self) -> None:
        self._section.enter_context(self._detector.detection_section("step", profile_cuda=True))


def slow_ranks(found: dict[str, Any]) -> list[str]:
    """Return one line per kind of slow GPU in the result of `Report.identify_stragglers`."""
    kinds = {
        "straggler_gpus_relative": "slower than the fastest rank's",
        "straggler_gpus_individual": "slower than before",
    }
    lines = []
    for kind, comparison in kinds.items():
        slow = sorted((rank.rank, rank.node) for rank in found[kind])
        if slow:
            who = ", ".join(f"rank {rank} ({node})" for rank, node in slow)
            lines.append(f"the kernels of {who} are {comparison} by a quarter or more")
    return lines
