"""Content of result.json, strictly validated: a damaged number must not become a place in a ranking."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, ValidationError

from megatron_cpt.checkpoint.record import read_json
from megatron_cpt.config.quantities import Section
from megatron_cpt.errors import RefusedError

RESULT_FILE = "result.json"
FORMAT_VERSION = 1

# A cross-entropy is not negative, apart from rounding.
_Loss = Annotated[float, Field(ge=-1e-3)]


class ResultFile(Section):
    """A result.json; null stands for a number that is not finite."""

    format: Literal["megatron-cpt experiment run"] = "megatron-cpt experiment run"
    """Mark of the command that wrote it."""
    format_version: Literal[1] = 1
    """Version of the format."""
    steps: int = Field(gt=0)
    """Last step."""
    held_out: dict[str, _Loss | None]
    """Loss per held-out source."""
    tasks: dict[str, dict[str, float | None]]
    """Metrics per task."""
    source_tokens: dict[str, Annotated[int, Field(ge=0)]]
    """Tokens per source."""
    higher_is_better: dict[str, dict[str, bool]]
    """Direction per task and metric."""
    inputs: dict[str, str]
    """Fingerprints of the files that the run read."""


def read_result_file(path: Path) -> ResultFile:
    """Read and validate a result.json.

    Raises:
        RefusedError: it is damaged, or of a newer version.
    """
    content = read_json(path)
    version = content.get("format_version")
    if isinstance(version, int) and version > FORMAT_VERSION:
        raise RefusedError(f"{path}: format version {version}, this software reads {FORMAT_VERSION}; update it")
    missing = [name for name in ResultFile.model_fields if name not in content]
    if missing:
        raise _damaged(path, f"{', '.join(missing)}: missing")
    try:
        return ResultFile.model_validate(content)
    except ValidationError as error:
        faults = [f"{'.'.join(map(str, one['loc']))}: {one['msg']}" for one in error.errors()[:3]]
        raise _damaged(path, "; ".join(faults)) from error


def _damaged(path: Path, reason: str) -> RefusedError:
    return RefusedError(f"{path}: damaged ({reason}); remove it, and run the experiment again")
