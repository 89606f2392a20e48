"""Faults of disks and clocks for whole processes, by a library that is preloaded into them.

A control file has one rule per line: `FAULT CALL FIRST COUNT VALUE GLOB`.

- FAULT: EIO, ESTALE, ETIMEDOUT, EAGAIN, EINTR, ENOSPC, EDQUOT, EROFS, EMFILE or EACCES; `short` (transfer at most VALUE
  bytes); `delay` (VALUE milliseconds); `shift` (the settable clock, by VALUE seconds); `skip` (end waits after VALUE
  milliseconds); `log` (record the call).
- CALL: open, read, write, fsync, rename, stat, clock, sleep, or any. Positional and vector variants count as their
  kind.
- FIRST, COUNT: the first matching call that is hit, counted from 1 over all processes, and how many; 0: all from
  there on.
- GLOB: of the absolute path; `*` also matches slashes. The path of a rename is its target; clocks are /clock, sleeps
  are /sleep.

The first rule that matches hits. `Control.hits` returns how often each rule did.
"""

from __future__ import annotations

import functools
import hashlib
import os
import shutil
import struct
import subprocess
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

_SOURCE = Path(__file__).with_name("shim.c")


@dataclass(frozen=True)
class Rule:
    """One line of a control file."""

    fault: str
    call: str
    glob: str
    first: int = 1
    count: int = 0
    value: int = 0


@dataclass(frozen=True)
class Control:
    """A control file, and the counters that the library keeps beside it."""

    path: Path

    def write(self, rules: Sequence[Rule]) -> None:
        """Replace the rules and set all counters to 0."""
        lines = (f"{r.fault} {r.call} {r.first} {r.count} {r.value} {r.glob}\n" for r in rules)
        self.path.write_text("".join(lines))
        for beside in (self._beside("hits"), self._beside("log")):
            beside.unlink(missing_ok=True)

    def hits(self) -> list[int]:
        """Return the number of injected faults per rule."""
        content = self._beside("hits").read_bytes()
        counters = struct.unpack(f"={len(content) // 8}Q", content)
        return list(counters[1::2])[: len(self.path.read_text().splitlines())]

    def logged(self) -> Counter[tuple[str, str]]:
        """Return how often `log` rules have recorded each (call, path)."""
        log = self._beside("log")
        lines = log.read_text(errors="surrogateescape").splitlines() if log.exists() else []
        return Counter((call, path) for call, _, path in (line.partition(" ") for line in lines))

    def _beside(self, ending: str) -> Path:
        return self.path.with_name(f"{self.path.name}.{ending}")


@functools.cache
def build() -> Path | None:
    """Return the library, built once per version of its source; None without a C compiler."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        return None
    name = hashlib.sha256(_SOURCE.read_bytes()).hexdigest()[:16]
    library = Path(tempfile.gettempdir()) / f"faulty_io-{os.getuid()}-{name}.so"
    if not library.exists():
        building = library.with_suffix(f".{os.getpid()}")
        command = [compiler, "-shared", "-fPIC", "-O1", "-w", "-o", str(building), str(_SOURCE), "-ldl"]
        subprocess.run(command, check=True, capture_output=True)
        os.replace(building, library)
    return library
