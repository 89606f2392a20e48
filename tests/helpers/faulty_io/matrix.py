"""Every command under every fault of every file that it touches.

The files of a command are found by recording a quiet run, so a new file is in the matrix without a change here. After
each case the command runs again without faults, and must give the bits of the quiet run.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import re
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import orjson

from tests.helpers.faulty_io import Rule
from tests.helpers.faulty_io.server import FaultyCommands, Outcome
from tests.helpers.runs import MACHINE_KEYS

YEAR = 365 * 86400
FAULTS: dict[str, tuple[tuple[str, int], ...]] = {
    "open": (("EIO", 1), ("ESTALE", 1), ("EIO", 0)),
    "read": (("short", 0), ("EINTR", 3), ("EIO", 1), ("ESTALE", 1), ("ETIMEDOUT", 1), ("EIO", 0), ("delay", 3)),
    "write": (("short", 0), ("EINTR", 3), ("EIO", 1), ("ENOSPC", 0)),
    "fsync": (("EIO", 1),),
    "rename": (("EIO", 1), ("ENOSPC", 0)),
    "stat": (("EIO", 1), ("ESTALE", 0)),
}
"""Faults per call: name, and how often it occurs; 0: always."""
_VALUES = {"short": 777, "delay": 20}
_MOST_READS = 12  # of a file that fail one after another
_QUICK = Rule("skip", "sleep", "*", value=1)  # retries wait 1 ms
_LESSER = {"latest", "plans.jsonl"}  # a run whose checkpoint is saved continues without them, with a warning
_TEMPORARY = re.compile(r"(?<=\.tmp-)\d+|(?<=\.)[0-9a-f]{32}(?=\.)")
_CHANGING = re.compile(r".*(seconds|per second|/s\b|_per_second|, [\d.]+ s$).*")
_NO_RESULT = re.compile(r".*(\.lock|/tensorboard/.*|/logs/.*|/report\.html|/events\.jsonl)$")  # history of the starts


@dataclass(frozen=True)
class Command:
    """Command of the matrix; the paths in its arguments are relative to the folder of the matrix."""

    name: str
    arguments: tuple[str, ...]
    start: Mapping[str, str] = field(default_factory=dict)
    """Folders that are copied before it runs: to -> from."""
    names_faults: bool = False
    """True if the command does not end for a file that cannot be read, and names it in its result."""


@dataclass(frozen=True)
class Case:
    """A fault of one kind of call on one file of a command."""

    command: Command
    fault: str
    count: int
    call: str
    glob: str
    first: int = 1
    """Number of the first call that it hits."""

    @property
    def rule(self) -> Rule:
        """The rule that injects it."""
        value = YEAR if self.fault == "shift" else _VALUES.get(self.fault, 0)
        return Rule(self.fault, self.call, self.glob, first=self.first, count=self.count, value=value)

    def __str__(self) -> str:
        return f"{self.command.name}: {self.fault} x{self.count or 'all'} {self.call} {self.first} {self.glob}"


DATA_COMMANDS = (
    *(
        Command(
            f"preprocess {kind}",
            (
                *("preprocess", "--input", f"in/web.{kind}", "--output-prefix", "out/web", "--tokenizer", "byte"),
                *("--append-eod", "--workers", "1"),
            ),
        )
        for kind in ("jsonl", "jsonl.gz", "jsonl.zst", "parquet", "arrow")
    ),
    Command("check", ("check", "in/a", "in/b", "--json")),
    Command("inspect", ("inspect", "in/a", "--json")),
    Command("merge", ("merge", "--input", "in/a", "in/b", "--output-prefix", "out/ab")),
    Command(
        "split",
        ("split", "--input", "in/a", "--fraction", "0.3", "--held-out-prefix", "out/h", "--rest-prefix", "out/r"),
    ),
    Command("overlap", ("overlap", "--train", "in/a", "--held-out", "in/b", "--json")),
    Command("plan", ("plan", "in/run.yaml", "--json")),
)
_RECIPE = (
    *("--general", "a=in/a", "--qa", "b=in/b", "--split", "10%", "--split-dir", "out/split"),
    *("--tokens", "8192", "--max-lr", "0.001", "--tokenizer", "byte", "--seq-length", "32", "--global-batch", "4"),
)
TORCH_COMMANDS = (
    Command("convert import", ("convert", "import", "in/hf", "out/base", "--workers", "1")),
    Command("convert export", ("convert", "export", "in/base", "out/hf", "--workers", "1")),
    Command("convert verify", ("convert", "verify", "in/hf", "in/base", "--workers", "1")),
    Command("train", ("train", "in/run.yaml", "output=out/run")),
    Command("resume", ("train", "in/run.yaml", "output=out/run", "tokens=512"), {"out/run": "in/stopped"}),
    Command("trace", ("trace", "in/stopped", "--step", "1", "--json")),
    Command("report", ("report", "in/stopped", "--output", "out/page.html"), names_faults=True),
    Command("recipe", ("recipe", "in/stopped", *_RECIPE, "--output", "out/run.yaml")),
    Command("average", ("average", "--run", "in/stopped", "--last", "2", "--output", "out/average", "--workers", "1")),
    Command("grow", ("grow", "in/base", "--to", "in/grown.yaml", "--output", "out/grown", "--workers", "1")),
    Command("teach", ("teach", "in/stopped", "--run", "in/run.yaml", "--output", "out/cache")),
    Command("generate", ("generate", "in/stopped", "--prompt", "a", "--max-new-tokens", "2", "--tokenizer", "byte")),
)


def write_text_inputs(folder: Path, num_documents: int = 300) -> None:
    """Write the inputs of `DATA_COMMANDS` except run.yaml, without `megatron_cpt`'s own readers."""
    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq
    import zstandard

    from megatron_cpt.data import IndexedDatasetWriter

    (folder / "in").mkdir(parents=True)
    texts = [f"document {number} " + "some words " * (number % 17) for number in range(num_documents)]
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()
    (folder / "in/web.jsonl").write_bytes(lines)
    (folder / "in/web.jsonl.gz").write_bytes(gzip.compress(lines, mtime=0))
    (folder / "in/web.jsonl.zst").write_bytes(zstandard.compress(lines))
    table = pa.table({"text": texts})
    pq.write_table(table, folder / "in/web.parquet", row_group_size=100)
    with pa.OSFile(str(folder / "in/web.arrow"), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=100)
    for name, shift in (("a", 0), ("b", 90)):
        with IndexedDatasetWriter(str(folder / "in" / name), np.uint16) as writer:
            for number in range(num_documents // 3):
                text = texts[(number + shift) % len(texts)].encode()
                writer.add_document(np.append(np.frombuffer(text, np.uint8), 256).astype(np.uint16))


def cases_of(command: Command, touched: Mapping[tuple[str, str], int], folder: Path) -> Iterator[Case]:
    """Yield the cases of a command, from the number of each (call, path) of a quiet run."""
    seen = set()
    for (call, path), number in sorted(touched.items()):
        if call in FAULTS and path.startswith(f"{folder}/") and "/control" not in path:
            glob = _TEMPORARY.sub("*", path)
            if (call, glob) not in seen:
                seen.add((call, glob))
                yield from (Case(command, fault, count, call, glob) for fault, count in FAULTS[call])
                if call == "read":  # other code may read the file later
                    later = range(2, min(number, _MOST_READS) + 1)
                    yield from (Case(command, "EIO", 1, call, glob, first) for first in later)
    yield Case(command, "shift", 0, "clock", "*")


class Matrix:
    """Runs cases; the inputs are in `folder`/in, the outputs in `folder`/out.

    Attributes:
        counts: number of cases by their end.
        failures: one text per case that ended in another way than it should.
        quiet: digest per result, by the name of the command.
    """

    def __init__(self, folder: Path, commands: FaultyCommands) -> None:
        self.folder, self._commands = folder, commands
        self.counts = Counter[str]()
        self.failures: list[str] = []
        self.quiet: dict[str, dict[str, str]] = {}

    def cases(self, command: Command) -> list[Case]:
        """Run a command quietly, remember its result, and return its cases."""
        outcome = self.outcome(command, [Rule("log", "any", f"{self.folder}/*")])
        assert outcome.status == 0, f"{command.name}: {outcome.status}\n{outcome.stderr}"
        self.quiet[command.name] = self._result(outcome)
        return list(cases_of(command, self._commands.control.logged(), self.folder))

    def outcome(self, command: Command, rules: Sequence[Rule] = (), *, is_repeated: bool = False) -> Outcome:
        """Run a command under rules; a repeated one finds the files of the previous call."""
        if not is_repeated:
            self._reset(command)
        return self._commands.run(command.arguments, [_QUICK, *rules])

    def differing(self, command: Command, outcome: Outcome) -> list[str]:
        """Return the names of the results that differ from the quiet run."""
        return _differing(self._result(outcome), self.quiet[command.name])

    def run(self, case: Case) -> None:
        """Run one case, then the same command without faults."""
        outcome = self.outcome(case.command, [case.rule])
        wrong = self._judge(case, outcome)
        if wrong is None and outcome.status != 0:
            wrong = self._judge_next_call(case.command, self.differing(case.command, outcome))
        if wrong is not None:
            self.counts["wrong"] += 1
            self.failures.append(f"{case}: {wrong}")
        elif not outcome.hits[1]:
            self.counts["not reached"] += 1
        else:
            self.counts["right result" if outcome.status == 0 else f"one message, status {outcome.status}"] += 1

    def _judge_next_call(self, command: Command, left: Sequence[str]) -> str | None:
        """Return what is wrong with the call after a failed one, which has left results that differ."""
        again = self.outcome(command, is_repeated=True)
        is_complete = set(left) <= {"stdout"}  # the fault came after the result was published
        if again.status == 2 and "exists already" in again.stderr and is_complete:
            return None
        if again.status != 0:
            return f"the next call ended with {again.status}: {again.stderr[-1500:]}"
        differing = self.differing(command, again)
        if differing == ["stdout"] and len(self.quiet[command.name]) > 1:
            return None  # it says how much of the work the failed call has left
        return f"after the next call other results: {differing}" if differing else None

    def _judge(self, case: Case, outcome: Outcome) -> str | None:
        text = f"status {outcome.status}: {outcome.stderr[-2500:]}"
        if outcome.status == 0:
            differing = self.differing(case.command, outcome)
            if not differing or self._is_named(case, outcome, differing):
                return None
            return f"status 0 with other results: {differing}\n{text}"
        if case.call == "read" and case.count == 1:
            return f"a read that fails once was not repeated; {text}"
        errors = [line for line in outcome.stderr.splitlines() if line.startswith("megatron-cpt: error:")]
        if outcome.status != 1 or "Traceback" in outcome.stderr or len(errors) != 1:
            return f"not one message with status 1; {text}"
        if case.call in ("open", "read", "stat") and not _names(errors[0], case.glob):
            return f"the message does not name the file; {text}"
        return None

    def _is_named(self, case: Case, outcome: Outcome, differing: Sequence[str]) -> bool:
        """Return whether the results that differ, or the warnings, name the file of the fault."""
        if case.command.names_faults and "stdout" not in differing:
            return all(_names((self.folder / name).read_text(errors="replace"), case.glob) for name in differing)
        warnings = "\n".join(line for line in outcome.stderr.splitlines() if " is saved, but " in line)
        return {Path(name).name for name in differing} <= _LESSER and _names(warnings, case.glob)

    def _reset(self, command: Command) -> None:
        shutil.rmtree(self.folder / "out", ignore_errors=True)
        (self.folder / "out").mkdir()
        for target, source in command.start.items():
            shutil.copytree(self.folder / source, self.folder / target)

    def _result(self, outcome: Outcome) -> dict[str, str]:
        """Return a digest per file of the output, and one of what was printed, without what changes with time."""
        printed = "".join(line for line in outcome.stdout.splitlines(True) if not _CHANGING.match(line))
        found = {"stdout": hashlib.sha256(printed.encode()).hexdigest()}
        for path in sorted((self.folder / "out").rglob("*")):
            if path.is_file() and not _NO_RESULT.match(str(path)):
                content = path.read_bytes()
                if path.name == "metrics.jsonl":
                    lines = map(orjson.loads, content.splitlines())
                    content = orjson.dumps(
                        [{key: line[key] for key in line if key not in MACHINE_KEYS} for line in lines]
                    )
                if "/step-" in str(path) or path.name == "plans.jsonl":
                    content = _without_ids(path.name, content)
                found[str(path.relative_to(self.folder))] = hashlib.sha256(content).hexdigest()
        return found


def _without_ids(name: str, content: bytes) -> bytes:
    """Drop the id of the run, and the description of the tensors, which holds a random id of the save."""
    if name == "manifest.json":
        files = orjson.loads(content)["files"]
        return orjson.dumps({key: files[key] for key in files if key not in (".metadata", "state.json")})
    if name in ("state.json", "plans.jsonl"):
        lines = [content] if name == "state.json" else content.splitlines()
        return b"".join(orjson.dumps({**orjson.loads(line), "run_id": None}) for line in lines)
    return b"" if name == ".metadata" else content


def _differing(found: Mapping[str, str], quiet: Mapping[str, str]) -> list[str]:
    return [name for name in sorted(found.keys() | quiet.keys()) if found.get(name) != quiet.get(name)]


def _names(error: str, glob: str) -> bool:
    """Return whether a message names a file; for a temporary file the name of the final one is enough."""
    name = glob.rpartition("/")[2].removeprefix(".").partition(".tmp")[0].partition("*")[0]
    return name in error


def write_run(folder: Path) -> None:
    """Write in/run.yaml: a run of 2 steps with a save after each."""
    run = {
        "name": "matrix",
        "output": "out/run",
        "model": {"preset": "tiny_llama", "vocab": 257},
        "seq_length": 32,
        "batch": {"global": 4, "micro": 4},
        "tokens": 2 * 4 * 32,
        "schedule": {"shape": "constant", "max_lr": 1e-3, "min_lr": 1e-3},
        "sources": {"a": {"path": "in/a"}, "b": {"path": "in/b"}},
        "phases": [{"name": "all", "blend": {"a": 0.5, "b": 0.5}}],
        "precision": {"compute": "fp32"},
        "checkpoint": {"every": 1, "keep": 4, "async": False},
        "log": {"every": 1, "tensorboard": False},
    }
    (folder / "in/run.yaml").write_text(json.dumps(run))


def write_torch_inputs(folder: Path, commands: FaultyCommands) -> None:
    """Write the inputs of `TORCH_COMMANDS`: a Hugging Face folder, its checkpoint, and a run stopped at step 2 of 4."""
    from tests.helpers.hf_models import save_hf_model

    save_hf_model(folder / "in/hf", "llama")
    (folder / "in/grown.yaml").write_text("layers: 4\n")
    for arguments in (
        ("convert", "import", "in/hf", "in/base"),
        ("train", "in/run.yaml", "output=in/stopped", "tokens=512", "stop_at_step=2"),
    ):
        outcome = commands.run(arguments)
        assert outcome.status == 0, outcome.stderr
