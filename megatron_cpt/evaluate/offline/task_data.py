"""Data of the offline tasks, as lm-evaluation-harness asks for it (`custom_dataset` in a task file)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import orjson

from megatron_cpt.errors import RefusedError
from megatron_cpt.evaluate.offline.build_tasks import MANIFEST, REBUILD
from megatron_cpt.files.checksum import file_checksum
from megatron_cpt.files.whole_io import read_file


def load(*, config_source: str, dataset: str, **_: Any) -> Any:
    """Return a `datasets.DatasetDict` with the splits of one dataset.

    Args:
        config_source: path of the task file; lm-eval puts it into a task's metadata. The data is in the same folder,
            so the folder can be copied to another machine.
        dataset: name of the dataset.

    Raises:
        RefusedError: a file is missing, or differs from what was built.
    """
    import datasets

    folder = Path(config_source).parent
    try:
        files = orjson.loads(read_file(folder / MANIFEST))["datasets"][dataset]["files"]
        splits = {split: rows(folder / file["name"], file["checksum"]) for split, file in files.items()}
    except (OSError, orjson.JSONDecodeError, KeyError) as error:
        raise RefusedError(f"{folder}: the data of {dataset} cannot be read ({error}); {REBUILD}") from error
    return datasets.DatasetDict({split: datasets.Dataset.from_list(found) for split, found in splits.items()})


def rows(path: Path, checksum: str) -> list[dict[str, Any]]:
    """Return the rows of a file whose checksum is right."""
    if file_checksum(path) != checksum:
        raise RefusedError(f"{path} differs from the file that was built; {REBUILD}")
    return [orjson.loads(line) for line in read_file(path).splitlines()]
