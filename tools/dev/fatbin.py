"""Zero the GPU code of all architectures but one in a shared library, so that it compresses to a fraction.

    python3 tools/dev/fatbin.py LIBRARY                    # list the code by kind and architecture
    python3 tools/dev/fatbin.py LIBRARY --keep 90 --output PRUNED

nvcc puts the code of all architectures into the ELF sections `.nv_fatbin` (and `__nv_relfatbin` for device code that is
linked later). A section is a sequence of containers, each padded with zeros to 8 bytes:

    container   magic 0xBA55ED50 (u32), version 1 (u16), header size 16 (u16), size of the entries in bytes (u64)
      entry     kind (u16: 1 PTX, 2 machine code), unused (u16), header size (u32), payload size (u64), ...
                architecture at byte 28 (u32: 90 for sm_90 and sm_90a), ...; then the payload

Only the payloads of other architectures are zeroed. Sizes, headers and addresses stay, so the dynamic linker sees the
same library, and the CUDA driver finds the code of its architecture in the same place. No pruned library has run on a
GPU yet.

NVIDIA does not document the format. Sources: `fat_elf_header` and `fat_text_header` in RWTH-ACS/cricket,
cpu/cpu-elf2.c; `FatbinFileHeader` in ZLUDA.
"""

from __future__ import annotations

import argparse
import mmap
import shutil
import struct
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MAGIC = 0xBA55ED50
SECTIONS = (".nv_fatbin", "__nv_relfatbin")
KINDS = {1: "PTX", 2: "machine code"}
_CONTAINER = struct.Struct("<IHHQ")
_ENTRY = struct.Struct("<HHIQIIHHI")
_PADDING = 8


class FatbinError(Exception):
    """The file is no shared library with GPU code, or its GPU code is damaged."""


@dataclass(frozen=True)
class Entry:
    """Code for one architecture.

    Attributes:
        kind: 1 is PTX, 2 is machine code.
        arch: 90 for sm_90.
        start, size: position and size of the payload in the file, in bytes.
    """

    kind: int
    arch: int
    start: int
    size: int


def read_entries(library: Any, name: str) -> list[Entry]:
    """Return the entries of all containers of a shared library.

    Args:
        library: bytes or mmap of the file.
        name: of the file, for errors.

    Raises:
        FatbinError: not a 64-bit ELF file with GPU code, or a container or entry that exceeds its surroundings.
    """
    entries = []
    for start, size in _sections(library, name):
        entries += _entries_of_section(library, start, start + size, name)
    if not entries:
        raise FatbinError(f"{name}: has no GPU code; is it the right library?")
    return entries


def _sections(library: Any, name: str) -> Iterator[tuple[int, int]]:
    """Yield offset and size of the sections with GPU code; see `Elf64_Ehdr` and `Elf64_Shdr` in elf(5)."""
    if library[:6] != b"\x7fELF\x02\x01":
        raise FatbinError(f"{name}: not a 64-bit ELF library")
    try:
        (table,) = struct.unpack_from("<Q", library, 0x28)
        entry_size, count, names_index = struct.unpack_from("<HHH", library, 0x3A)
        headers = [struct.unpack_from("<IIQQQQ", library, table + number * entry_size) for number in range(count)]
        *_, names_start, names_size = headers[names_index]
    except (struct.error, IndexError) as error:
        raise FatbinError(f"{name}: truncated: its section table is incomplete") from error
    names = bytes(library[names_start : names_start + names_size])
    for name_offset, _, _, _, start, size in headers:
        section = names[name_offset:].split(b"\0", 1)[0].decode(errors="replace")
        if section in SECTIONS:
            if start + size > len(library):
                raise FatbinError(f"{name}: truncated: section {section} ends at {start + size}, behind the file")
            yield start, size


def _entries_of_section(library: Any, start: int, end: int, name: str) -> Iterator[Entry]:
    position = start
    while position + _CONTAINER.size <= end:
        magic, version, header_size, size = _CONTAINER.unpack_from(library, position)
        if magic == 0:  # padding
            position += _PADDING
            continue
        if (magic, version, header_size) != (MAGIC, 1, _CONTAINER.size):
            raise FatbinError(f"{name}: no container of GPU code at byte {position} (found {magic:#x}, {version})")
        first, last = position + header_size, position + header_size + size
        if last > end:
            raise FatbinError(f"{name}: damaged: the container at byte {position} ends at {last}, its section at {end}")
        yield from _entries_of_container(library, first, last, name)
        position = last + -last % _PADDING


def _entries_of_container(library: Any, start: int, end: int, name: str) -> Iterator[Entry]:
    position = start
    while position < end:
        if position + _ENTRY.size > end:
            raise FatbinError(f"{name}: damaged: the entry at byte {position} exceeds its container")
        kind, _, header_size, size, _, _, _, _, arch = _ENTRY.unpack_from(library, position)
        payload = position + header_size
        if header_size < _ENTRY.size or payload + size > end:
            raise FatbinError(f"{name}: damaged: the entry at byte {position} exceeds its container")
        yield Entry(kind, arch, payload, size)
        position = payload + size


def prune(source: Path, target: Path, keep: int) -> tuple[int, int]:
    """Write a copy of a library with the payloads of all architectures but one zeroed.

    Args:
        source, target: the library and its copy.
        keep: architecture to keep, 90 for sm_90.

    Returns:
        Bytes of GPU code that were kept, and bytes that were zeroed.

    Raises:
        FatbinError: as `read_entries`, or the library has no code for `keep`. Nothing is written then.
    """
    with source.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as library:
        entries = read_entries(library, source.name)
    kept = [entry for entry in entries if entry.arch == keep]
    if not kept:
        found = ", ".join(f"sm_{arch}" for arch in sorted({entry.arch for entry in entries}))
        raise FatbinError(f"{source.name}: has no code for sm_{keep}, only for {found}")
    shutil.copyfile(source, target)
    others = [entry for entry in entries if entry.arch != keep]
    with target.open("r+b") as file, mmap.mmap(file.fileno(), 0) as library:
        for entry in others:
            library[entry.start : entry.start + entry.size] = bytes(entry.size)
    return sum(entry.size for entry in kept), sum(entry.size for entry in others)


def main(arguments: list[str] | None = None) -> int:
    """List or prune a library; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("library", type=Path)
    parser.add_argument("--keep", type=int, help="architecture to keep, 90 for sm_90")
    parser.add_argument("--output", type=Path, help="pruned copy")
    options = parser.parse_args(arguments)
    if (options.keep is None) != (options.output is None):
        parser.error("--keep and --output belong together")
    try:
        if options.output is not None:
            kept, zeroed = prune(options.library, options.output, options.keep)
            print(f"kept {kept / 2**20:.1f} MiB, zeroed {zeroed / 2**20:.1f} MiB")
            return 0
        sizes: Counter[tuple[int, int]] = Counter()
        for entry in read_entries(options.library.read_bytes(), options.library.name):
            sizes[entry.arch, entry.kind] += entry.size
    except (FatbinError, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    for (arch, kind), size in sorted(sizes.items()):
        print(f"sm_{arch:<4} {KINDS.get(kind, f'kind {kind}'):<13} {size / 2**20:8.1f} MiB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
