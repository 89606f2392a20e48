"""Documents agree with the code: keys, commands, links, and the run.yaml of the README."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_cpt.config import draft_config, run_schema
from tools.dev.docs_pages import commands_page, generated_pages, insert_speed_tables

REPOSITORY = Path(__file__).parents[3]
DOCUMENTS = [
    *REPOSITORY.glob("*.md"),
    *(REPOSITORY / "docs").rglob("*.md"),
    *(REPOSITORY / "examples").rglob("*.md"),
]


def keys_of(schema: dict[str, Any], definitions: dict[str, Any], prefix: str = "") -> set[str]:
    """Dotted paths of all keys, through optional sections and lists."""
    if "$ref" in schema:
        return keys_of(definitions[schema["$ref"].rpartition("/")[2]], definitions, prefix)
    keys: set[str] = set()
    for alternative in schema.get("anyOf", []):
        keys |= keys_of(alternative, definitions, prefix)
    if schema.get("type") == "array":
        keys |= keys_of(schema.get("items", {}), definitions, prefix)
    if isinstance(schema.get("additionalProperties"), dict):
        keys |= keys_of(schema["additionalProperties"], definitions, f"{prefix}NAME.")
    for key, field in schema.get("properties", {}).items():
        keys |= {prefix + key} | keys_of(field, definitions, f"{prefix}{key}.")
    return keys


SCHEMA = run_schema()
KEYS = keys_of(SCHEMA, SCHEMA["$defs"])


def test_the_readme_is_short_and_its_run_is_valid() -> None:
    readme = (REPOSITORY / "README.md").read_text()
    assert len(readme.splitlines()) < 100
    run = yaml.safe_load(re.search(r"```yaml\n(.*?)```", readme, re.DOTALL)[1])  # type: ignore[index]
    # `init.from` names a checkpoint that is not here, so the model it would give is named instead
    config = draft_config(run, ["model={preset: nemotron4_15b}"]).finish("README.md")
    assert [phase.name for phase in config.phases] == ["general", "qa"]


def test_flags_name_keys_that_exist() -> None:
    page = (REPOSITORY / "docs" / "reference" / "megatron-lm-flags.md").read_text()
    rows = re.findall(r"^\| `(--[\w-]+)` \| (?:`([\w.]+)`|none) \|", page, re.MULTILINE)
    assert len(rows) >= 60
    assert len({flag for flag, _ in rows}) == len(rows)
    assert [key for _, key in rows if key and key not in KEYS] == []


def test_generated_pages_are_complete() -> None:
    pages = generated_pages()
    run_yaml = pages["reference/run-yaml.md"]
    assert [key for key in KEYS if f"| `{key.rpartition('.')[2]}` |" not in run_yaml] == []
    assert "| `max_lr` | number | required |" in run_yaml
    for command in ("plan", "train", "convert import", "launch"):
        assert f"## megatron-cpt {command}\n" in commands_page()
    assert "reference/api/TokenStream.md" in pages


def test_a_speed_page_without_its_marker_is_refused() -> None:
    with pytest.raises(ValueError, match="marker"):
        insert_speed_tables("# Speed\n")


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_links_lead_to_files(document: Path) -> None:
    generated = {f"docs/{path}" for path in generated_pages()}
    missing = []
    for target in re.findall(r"\]\((?!https?:|#|mailto:)([^)#\s]+)", document.read_text()):
        path = (document.parent / target).resolve()
        if not path.exists() and str(path.relative_to(REPOSITORY)) not in generated:
            missing.append(target)
    assert missing == []
