"""GPU code in shared libraries: found, listed, pruned to one architecture; damaged containers are named."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.helpers.dev_tools import load_dev_tool

fatbin = load_dev_tool("fatbin")

Code = tuple[int, int, bytes]
"""Kind, architecture, payload."""

PTX, MACHINE = 1, 2
CONTAINERS: list[list[Code]] = [
    [(MACHINE, 80, b"a" * 40), (MACHINE, 90, b"b" * 24), (PTX, 90, b"c" * 16)],
    [(MACHINE, 100, b"d" * 7), (MACHINE, 90, b"e" * 9)],
]


def container(codes: list[Code]) -> bytes:
    entries = b""
    for kind, arch, payload in codes:
        entries += struct.pack("<HHIQIIHHI", kind, 0x101, 64, len(payload), 0, 0, 7, 1, arch).ljust(64, b"\0") + payload
    made = struct.pack("<IHHQ", 0xBA55ED50, 1, 16, len(entries)) + entries
    return made + bytes(-len(made) % 8)


def library(containers: list[list[Code]], section: str = ".nv_fatbin") -> bytes:
    """Return a small ELF file with a text section of other bytes and a section of GPU code."""
    names = b"\0.text\0" + section.encode() + b"\0.shstrtab\0"
    text, code = b"\x50\xed\x55\xba" * 6, b"".join(map(container, containers))
    starts = [64, 64 + len(text), 64 + len(text) + len(code)]
    headers = struct.pack("<IIQQQQ24x", 0, 0, 0, 0, 0, 0)
    for name, start, content in zip(
        (b".text", section.encode(), b".shstrtab"), starts, (text, code, names), strict=True
    ):
        headers += struct.pack("<IIQQQQ24x", names.index(name), 1, 0, 0, start, len(content))
    table = starts[2] + len(names)
    elf = b"\x7fELF\x02\x01".ljust(0x28, b"\0") + struct.pack("<Q", table)
    elf = elf.ljust(0x3A, b"\0") + struct.pack("<HHH", 64, 4, 3)
    return elf + text + code + names + headers


def pruned(tmp_path: Path, content: bytes, keep: int = 90) -> bytes:
    (tmp_path / "in.so").write_bytes(content)
    fatbin.prune(tmp_path / "in.so", tmp_path / "out.so", keep)
    return (tmp_path / "out.so").read_bytes()


@pytest.mark.parametrize("section", [".nv_fatbin", "__nv_relfatbin"])
def test_entries_are_found_in_all_containers(section: str) -> None:
    content = library(CONTAINERS, section)
    entries = fatbin.read_entries(content, "lib.so")
    found = [(entry.kind, entry.arch, content[entry.start : entry.start + entry.size]) for entry in entries]
    assert found == [code for codes in CONTAINERS for code in codes]


def test_the_list_adds_up_by_architecture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "in.so").write_bytes(library([[(MACHINE, 90, bytes(3 << 20)), (PTX, 90, bytes(1 << 20))]] * 2))
    assert fatbin.main([str(tmp_path / "in.so")]) == 0
    assert [line.split() for line in capsys.readouterr().out.splitlines()] == [
        ["sm_90", "PTX", "2.0", "MiB"],
        ["sm_90", "machine", "code", "6.0", "MiB"],
    ]


codes = st.tuples(st.sampled_from([PTX, MACHINE]), st.sampled_from([75, 80, 90, 100]), st.binary(max_size=50))


@given(containers=st.lists(st.lists(codes, min_size=1, max_size=5), min_size=1, max_size=4))
def test_only_payloads_of_other_architectures_change(
    tmp_path_factory: pytest.TempPathFactory, containers: list[list[Code]]
) -> None:
    containers = [[(MACHINE, 90, b"kept"), *containers[0]], *containers[1:]]
    others_zeroed = [
        [(kind, arch, code if arch == 90 else bytes(len(code))) for kind, arch, code in entries]
        for entries in containers
    ]
    assert pruned(tmp_path_factory.mktemp("so"), library(containers)) == library(others_zeroed)


def test_a_library_without_the_architecture_is_refused(tmp_path: Path) -> None:
    with pytest.raises(fatbin.FatbinError, match=r"in\.so: has no code for sm_120, only for sm_80, sm_90, sm_100"):
        pruned(tmp_path, library(CONTAINERS), keep=120)
    assert not (tmp_path / "out.so").exists()


def damage(position: int, new: bytes) -> bytes:
    content = library(CONTAINERS)
    start = 64 + 24 + position
    return content[:start] + new + content[start + len(new) :]


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"no library", "not a 64-bit ELF library"),
        (library(CONTAINERS)[:-40], "truncated"),
        (library([]), "has no GPU code"),
        (library(CONTAINERS, ".other"), "has no GPU code"),
        (damage(0, b"\x01"), "no container of GPU code at byte 88"),
        (damage(4, b"\x02"), "no container of GPU code at byte 88"),
        (damage(8, b"\xff\xff"), "damaged: the container at byte 88 ends at"),
        (damage(16 + 4, b"\x00\x00"), "damaged: the entry at byte 104 exceeds"),
        (damage(16 + 8, b"\xff\xff\xff\xff\xff\xff\xff\x0f"), "damaged: the entry at byte 104 exceeds"),
        (damage(16 + 8, struct.pack("<Q", 40 + 8)), "damaged: the entry at byte"),
    ],
)
def test_damage_is_named(tmp_path: Path, content: bytes, says: str, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "in.so").write_bytes(content)
    assert fatbin.main([str(tmp_path / "in.so"), "--keep", "90", "--output", str(tmp_path / "out.so")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("in.so: ")
    assert says in error
    assert not (tmp_path / "out.so").exists()
