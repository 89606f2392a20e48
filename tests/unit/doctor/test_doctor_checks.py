"""The checks of a node, given facts about other machines."""

from __future__ import annotations

import dataclasses
import io
from pathlib import Path

import pytest

from megatron_cpt.cli.commands.runs.doctor_command import _render
from megatron_cpt.config import ParallelConfig
from megatron_cpt.doctor import disk, gpus, host, nodes, software
from megatron_cpt.doctor.diagnosis import Diagnosis, Level, passed
from megatron_cpt.doctor.gpus import Gpus, InstalledGpu
from megatron_cpt.doctor.host import Port
from megatron_cpt.doctor.run_checks import Examination, check_layout
from megatron_cpt.doctor.software import Software
from megatron_cpt.planning.hardware import emulates_bf16

RANGES = (("torch", ">=2.6"), ("megatron-core", ">=0.16.1,<0.20"))
NODE = Software("3.12.3", "2.10.0a0+b4e4ee81d3", "0.19.2", "2.10", "0.1", "13.1", "2.28.9", RANGES)
H100 = InstalledGpu("NVIDIA H100 80GB HBM3", "580.95.05", 81559, 4, 1980, 0)
EIGHT = Gpus((H100,) * 8, (18,) * 8)


def _levels(findings: list[Diagnosis]) -> dict[str, Level]:
    return {finding.check: finding.level for finding in findings}


def test_versions_are_compared_with_the_requirements() -> None:
    assert set(_levels(software.check_core(NODE)).values()) == {Level.OK}
    old = dataclasses.replace(NODE, torch="2.5.1", megatron_core="0.20.0")
    assert _levels(software.check_core(old)) == {"torch": Level.BLOCKS, "megatron-core": Level.BLOCKS}
    assert "pip install 'megatron-core>=0.16.1,<0.20'" in software.check_core(old)[1].way_out
    assert software.check_core(dataclasses.replace(NODE, torch=None))[0].found == "not installed"
    untried = dataclasses.replace(NODE, python="3.11.7")
    assert software.check_core(untried)[1].level is Level.NOTE


def test_the_real_requirements_are_read() -> None:
    found = software.read_software()
    assert dict(found.required)["megatron-core"] in (">=0.16.1,<0.20", "<0.20,>=0.16.1")
    assert set(_levels(software.check_core(found)).values()) <= {Level.OK, Level.NOTE}


X86 = "processor : 0\nflags\t\t: fpu avx2 avx512f {}\n\nprocessor : 1\nflags\t\t: fpu avx2 avx512f {}\n"


@pytest.mark.parametrize(
    ("cpuinfo", "is_emulated"),
    [
        (X86.format("", ""), True),
        (X86.format("avx512_bf16", "avx512_bf16"), False),
        (X86.format("amx_bf16", "amx_bf16"), False),
        ("Features\t: fp asimd bf16\n", False),
        ("Features\t: fp asimd\n", True),
        ("unknown\n", False),
        (None, False),
    ],
)
def test_a_cpu_without_bf16_is_told_from_its_flags(tmp_path: Path, cpuinfo: str | None, is_emulated: bool) -> None:
    if cpuinfo is not None:
        (tmp_path / "cpuinfo").write_text(cpuinfo)
    assert emulates_bf16(tmp_path / "cpuinfo") == is_emulated


def test_bf16_is_a_note_only_where_it_is_emulated_and_used() -> None:
    slow = host.check_bf16("bf16", is_emulated=True)
    assert (slow.level, slow.way_out) == (Level.NOTE, "set precision.compute=fp32 to train on this CPU")
    assert host.check_bf16("fp32", is_emulated=True).level is Level.OK
    assert host.check_bf16("bf16", is_emulated=False).level is Level.OK


def test_a_missing_transformer_engine_costs_something_only_beside_a_gpu() -> None:
    bare = dataclasses.replace(NODE, transformer_engine=None, apex=None, nccl=None)
    assert software.check_transformer_engine(bare, has_gpu=False).level is Level.OK
    on_gpu = software.check_transformer_engine(bare, has_gpu=True)
    assert on_gpu.level is Level.NOTE
    assert "FP8 and attention by torch" in on_gpu.cost
    assert software.check_apex(bare, has_gpu=True).level is Level.NOTE
    assert software.check_apex(dataclasses.replace(NODE, apex=None), has_gpu=True).level is Level.OK
    assert software.check_nccl(bare, has_gpu=True).level is Level.BLOCKS


NVIDIA_SMI = """\
NVIDIA H100 80GB HBM3, 580.95.05, 81559, 1, 1980, 0, Not Active, Not Active, Not Active
NVIDIA H100 80GB HBM3, 580.95.05, 81559, 30210, 1980, 3, Active, Active, Not Active
Tesla T4, 580.95.05, 15360, 0, 1590, [N/A], Not Active, Not Active, Active
"""
LINKS = """\
GPU 0: NVIDIA H100 80GB HBM3 (UUID: GPU-1)
\t Link 0: 26.562 GB/s
\t Link 1: 26.562 GB/s
GPU 1: NVIDIA H100 80GB HBM3 (UUID: GPU-2)
\t Link 0: 26.562 GB/s
\t Link 1: <inactive>
"""


def test_nvidia_smi_is_read() -> None:
    first, second, third = gpus.parse_gpus(NVIDIA_SMI)
    assert first == dataclasses.replace(H100, memory_used=1)
    assert (second.ecc_errors, second.slowed_by) == (3, ("hardware", "thermal"))
    assert (third.ecc_errors, third.slowed_by) == (None, ("power brake",))
    assert gpus.parse_links(LINKS) == (2, 1)


def test_a_healthy_node_of_eight() -> None:
    findings = gpus.check_gpus(EIGHT, num_ranks=8, num_usable=8)
    assert set(_levels(findings).values()) == {Level.OK}
    assert findings[0].found == "8 x NVIDIA H100 80GB HBM3, 80 GiB; driver 580.95.05"
    assert findings[-1].found == "18 links per GPU"


@pytest.mark.parametrize(
    ("change", "links", "check", "level"),
    [
        ({"ecc_errors": 2}, None, "GPUs healthy", Level.BLOCKS),
        ({"slowed_by": ("thermal",)}, None, "GPUs healthy", Level.WARNING),
        ({"memory_used": 20000}, None, "GPUs free", Level.WARNING),
        ({"memory": 40000}, None, "GPUs alike", Level.WARNING),
        ({}, (18,) * 7 + (12,), "NVLink", Level.WARNING),
        ({}, (0,) * 8, "NVLink", Level.WARNING),
    ],
)
def test_one_bad_gpu_is_found(
    change: dict[str, object], links: tuple[int, ...] | None, check: str, level: Level
) -> None:
    bad = dataclasses.replace(H100, **change)  # type: ignore[arg-type]
    found = Gpus((H100,) * 7 + (bad,), links or EIGHT.num_links)
    levels = _levels(gpus.check_gpus(found, num_ranks=8, num_usable=8))
    assert levels.pop(check) is level
    assert set(levels.values()) == {Level.OK}


def test_more_ranks_than_gpus_or_a_torch_for_cpus_block() -> None:
    assert gpus.check_gpus(EIGHT, num_ranks=9, num_usable=8)[0].level is Level.BLOCKS
    assert gpus.check_gpus(EIGHT, num_ranks=8, num_usable=0)[0].level is Level.BLOCKS
    assert gpus.check_gpus(Gpus(problem="NVML: mismatch"), num_ranks=1, num_usable=0)[0].level is Level.BLOCKS
    assert gpus.check_gpus(Gpus(), num_ranks=4, num_usable=0)[0].level is Level.NOTE


def test_network_cards_are_read_from_the_kernel(tmp_path: Path) -> None:
    for card, state in (("mlx5_0", "4: ACTIVE"), ("mlx5_1", "1: DOWN")):
        port = tmp_path / card / "ports" / "1"
        port.mkdir(parents=True)
        for name, text in (("state", state), ("rate", "400 Gb/sec (4X NDR)"), ("link_layer", "InfiniBand")):
            (port / name).write_text(text + "\n")
    up, down = host.read_ports(tmp_path)
    assert up == Port("mlx5_0", "ACTIVE", "400 Gb/sec (4X NDR)", "InfiniBand")
    assert host.check_ports([up], num_nodes=2).level is Level.OK
    finding = host.check_ports([up, down], num_nodes=2)
    assert finding.level is Level.WARNING
    assert "mlx5_1" in finding.cost
    assert host.check_ports([], num_nodes=2).level is Level.WARNING
    assert host.check_ports([], num_nodes=1).level is Level.OK


def test_limits_of_the_host() -> None:
    assert host.check_open_files(1024).level is Level.WARNING
    assert host.check_open_files(None).level is Level.OK
    assert host.check_locked_memory(2**26, has_infiniband=True).level is Level.BLOCKS
    assert host.check_locked_memory(2**26, has_infiniband=False).level is Level.OK
    assert host.check_locked_memory(None, has_infiniband=True).level is Level.OK
    assert host.check_shared_memory(2**26).level is Level.WARNING
    assert host.check_shared_memory(2**34).level is Level.OK
    assert host.check_name("node-1", None, num_nodes=1).level is Level.BLOCKS
    assert host.check_name("node-1", "127.0.1.1", num_nodes=2).level is Level.WARNING
    assert host.check_name("node-1", "127.0.1.1", num_nodes=1).level is Level.OK
    assert host.check_port(29400, is_free=False).level is Level.WARNING


def test_a_taken_port_is_noticed() -> None:
    import socket

    with socket.socket() as server:
        server.bind(("", 0))
        server.listen()
        assert not host.is_port_free(server.getsockname()[1])


def test_a_disk_is_measured_and_left_unchanged(tmp_path: Path) -> None:
    measured = disk.try_disk(tmp_path / "not" / "yet", size=2**24)
    assert measured.problem is None
    assert min(measured.write, measured.read) > 1e6
    assert list(tmp_path.iterdir()) == []
    assert disk.check_output("out", measured).level is Level.OK
    assert disk.check_output("out", disk.Disk(0, problem="read-only")).level is Level.BLOCKS


def test_space_for_the_checkpoints_that_stay_and_the_one_being_written() -> None:
    assert disk.check_space(100, 3, 400).level is Level.OK
    assert disk.check_space(100, 3, 399).level is Level.WARNING
    assert disk.check_space(100, 3, 199).level is Level.BLOCKS


def test_time_of_a_save() -> None:
    measured = disk.Disk(0, write=1e9)
    assert disk.check_save_time(int(219e9), measured, 32).level is Level.OK
    assert disk.check_save_time(int(219e9), measured, 1).level is Level.OK
    assert disk.check_save_time(int(301e9), measured, 1).level is Level.WARNING


def test_layouts() -> None:
    parallel = ParallelConfig(tensor=8, pipeline=4)
    assert check_layout(parallel, 8, 4).level is Level.OK
    assert check_layout(parallel, 8, 3).level is Level.BLOCKS
    assert check_layout(parallel, 4, 8).level is Level.WARNING


def test_nodes_are_compared() -> None:
    one = nodes.Node("a", NODE, ("H100",) * 8, (("run.yaml", "x"), ("web", "y")), 100.0)
    same = dataclasses.replace(one, host="b", clock=100.1)
    assert nodes.check_alike([one]) == []
    assert set(_levels(nodes.check_alike([one, same])).values()) == {Level.OK}
    other = nodes.Node(
        "b",
        dataclasses.replace(NODE, nccl="2.27.3"),
        ("A100",) * 8,
        (("run.yaml", "x"), ("web", "z")),
        103.5,
    )
    findings = nodes.check_alike([one, other])
    assert _levels(findings) == {
        "same programs": Level.BLOCKS,
        "same GPUs": Level.WARNING,
        "same run": Level.BLOCKS,
        "same time": Level.WARNING,
    }
    assert findings[0].found == "b: nccl 2.27.3 instead of 2.28.9"
    assert findings[2].found == "b: web"
    assert findings[3].found == "b is 3.5 s ahead of a"


def test_other_nodes_show_only_what_is_wrong_there() -> None:
    full = Diagnosis("space", Level.BLOCKS, "full", "no checkpoint can be saved", "free some space")
    examination = Examination({"a": [passed("torch", "2.13")], "b": [passed("torch", "2.13"), full]}, [])
    assert examination.blocks
    out = io.StringIO()
    _render(examination.lines(), out)
    assert "b: full" in out.getvalue()
    assert out.getvalue().count("torch") == 1
    assert "1 of 3 checks block a run" in out.getvalue()
