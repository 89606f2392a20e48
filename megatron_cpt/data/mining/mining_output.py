"""Names of the output of `mine`: never a file that is read, and no file of others without `--overwrite`.

A kill may leave an output under its final name, and the work folder beside it. The next call replaces that output, but
not a file of something else that has come there since. So the files are recorded in the folder just before they get
their final names; a rename changes neither size nor modification time.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from megatron_cpt.data.tokenfile.document_list import is_document_list
from megatron_cpt.errors import UserError
from megatron_cpt.files.atomic import Rename, write_atomically
from megatron_cpt.files.identity import FileIdentity
from megatron_cpt.files.resumable import seal, unseal
from megatron_cpt.files.whole_io import exists, is_regular_file, read_file

_PUBLISHED = "published.json"  # in a work folder


def output_files(output: str) -> list[str]:
    """Return the paths of a list, or of a pair without its sidecar, which is never written over another file."""
    return [output] if is_document_list(output) else [f"{output}{end}" for end in (".bin", ".idx")]


def require_no_input(output: str, inputs: Iterable[str]) -> None:
    """Check that an output is none of the files that are read, also under another path.

    Raises:
        UserError: it is one, which no option allows.
    """
    targets = {os.path.realpath(path) for path in output_files(output)}
    if any(os.path.realpath(path) in targets for path in inputs):
        raise UserError(f"{output}: is an input too; choose another output")


def require_free_output(output: str, folder: Path | None) -> None:
    """Check that every existing file of an output was published from a work folder.

    Args:
        folder: the work folder of an interrupted call; None: there is none whose output may be replaced.

    Raises:
        UserError: a file is of something else.
    """
    published = [] if folder is None else _read_published(folder)
    taken = [path for path in output_files(output) if exists(path) and _describe(path, path) not in published]
    if taken:
        raise UserError(f"{' and '.join(taken)}: exists already; choose another output, or replace it: --overwrite")


def record_published(folder: Path, renames: Sequence[Rename]) -> None:
    """Record finished files in a work folder, before they get their final names."""
    files = [_describe(source, target) for source, target in renames if exists(source)]
    write_atomically(folder / _PUBLISHED, seal([*_read_published(folder), *files]))


def _read_published(folder: Path) -> list[Any]:
    path = folder / _PUBLISHED
    try:
        return list(unseal(read_file(path))) if is_regular_file(path) else []
    except ValueError:  # damaged: nothing is known to be published
        return []


def _describe(path: str, target: str) -> list[Any]:
    identity = FileIdentity.read(path)
    return [os.path.basename(target), identity.num_bytes, identity.mtime_ns]
