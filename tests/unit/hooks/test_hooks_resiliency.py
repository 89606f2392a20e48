"""The hook for nvidia-resiliency-ext, with a stand-in for the interface of version 0.4.1, because there is no GPU."""

from __future__ import annotations

import contextlib
import sys
from dataclasses import dataclass
from types import ModuleType, SimpleNamespace

import pytest
import torch

from megatron_cpt.config import draft_config
from megatron_cpt.errors import UserError
from megatron_cpt.hooks.resiliency import StragglerHook, slow_ranks


@dataclass(frozen=True)
class Slow:
    rank: int
    node: str


FOUND = {
    "straggler_gpus_relative": {Slow(3, "b"), Slow(1, "a")},
    "straggler_gpus_individual": set(),
    "straggler_sections_relative": {},
    "straggler_sections_individual": {},
}


@pytest.fixture
def detector(monkeypatch):
    """Stand-in for `nvidia_resiliency_ext.straggler.Detector`; returns the list of its calls."""
    calls = []

    class Detector:
        initialized = False

        @classmethod
        def initialize(cls, *, gather_on_rank0, profiling_interval, report_time_interval):
            cls.initialized = True
            calls.append(("initialize", gather_on_rank0, profiling_interval, report_time_interval))

        @classmethod
        @contextlib.contextmanager
        def detection_section(cls, name, profile_cuda):
            calls.append("enter")
            yield
            calls.append("leave")

        @classmethod
        def generate_report_if_interval_elapsed(cls):
            calls.append("report?")
            return SimpleNamespace(identify_stragglers=lambda gpu_rel_threshold, gpu_indiv_threshold: FOUND)

        @classmethod
        def shutdown(cls):
            cls.initialized = False
            calls.append("shutdown")

    package, straggler = ModuleType("nvidia_resiliency_ext"), ModuleType("nvidia_resiliency_ext.straggler")
    straggler.Detector, package.straggler = Detector, straggler
    monkeypatch.setitem(sys.modules, "nvidia_resiliency_ext", package)
    monkeypatch.setitem(sys.modules, "nvidia_resiliency_ext.straggler", straggler)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.delenv("FT_RANK_MONITOR_IPC_SOCKET", raising=False)
    return calls


def session(step=7):
    return SimpleNamespace(
        config=SimpleNamespace(log=SimpleNamespace(every=10)),
        ranks=SimpleNamespace(is_main=True),
        state=SimpleNamespace(step=step),
    )


def test_each_step_is_a_section_and_slow_ranks_are_reported(detector, caplog):
    hook = StragglerHook()
    hook.on_start(session())
    hook.on_step(session())
    hook.on_end(session())
    assert detector == [
        ("initialize", True, 10, 300.0), "enter", "leave", "report?", "enter", "leave", "shutdown",
    ]  # fmt: skip
    assert "step 7: the kernels of rank 1 (a), rank 3 (b) are slower than the fastest rank's" in caplog.text


def test_heartbeats_go_to_the_launcher_that_wants_them(detector, monkeypatch):
    beats = []

    class RankMonitorClient:
        def init_workload_monitoring(self):
            beats.append("init")

        def send_heartbeat(self):
            beats.append("beat")

        def shutdown_workload_monitoring(self):
            beats.append("end")

    module = ModuleType("nvidia_resiliency_ext.fault_tolerance")
    module.RankMonitorClient = RankMonitorClient
    monkeypatch.setitem(sys.modules, "nvidia_resiliency_ext.fault_tolerance", module)
    monkeypatch.setenv("FT_RANK_MONITOR_IPC_SOCKET", "/tmp/socket")
    hook = StragglerHook()
    hook.on_start(session())
    hook.on_step(session())
    hook.on_end(session())
    assert beats == ["init", "beat", "end"]


def test_a_rank_that_fails_before_the_start_shuts_nothing_down(detector):
    StragglerHook().on_end(session())
    assert detector == []


def test_nothing_slow_is_no_line():
    assert slow_ranks({"straggler_gpus_relative": set(), "straggler_gpus_individual": set()}) == []


def test_a_machine_without_a_gpu_or_without_the_package_is_told(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="no GPU"):
        StragglerHook()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setitem(sys.modules, "nvidia_resiliency_ext", None)
    with pytest.raises(UserError, match=r"pip install -e '.*\[resiliency\]'"):
        StragglerHook()


def test_a_run_asks_for_it(monkeypatch, run_data):
    from megatron_cpt.hooks import build_hooks

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    config = draft_config(run_data, ["resilience.straggler=true"]).config
    with pytest.raises(UserError, match=r"resilience\.straggler"):
        build_hooks(config)
