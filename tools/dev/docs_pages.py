"""Generate the reference pages of the documentation site; mkdocs calls the hooks below (`hooks` in mkdocs.yml).

    python tools/dev/docs_pages.py reference/run-yaml.md        # print one generated page

Commands come from `--help`, run.yaml from its JSON schema, API pages from the public names of `megatron_cpt`, and the
tables of `operations/speed.md` from the table of speed knobs. Nothing generated is committed, so nothing can be stale.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import megatron_cpt
from megatron_cpt.config import run_schema

SPEED_PAGE = "operations/speed.md"
SPEED_MARKERS = ("<!-- generated: speed knobs -->", "<!-- generated: environment variables -->")


def on_config(config: Any) -> Any:
    """Add one navigation entry per public name below Reference > API."""
    reference = next(section["Reference"] for section in config["nav"] if "Reference" in section)
    pages = [{path.removeprefix("reference/api/").removesuffix(".md"): path} for path in api_pages()]
    reference.append({"API": ["reference/api.md", *pages]})
    return config


def on_files(files: Any, config: Any) -> Any:
    """Add the generated pages to the site."""
    from mkdocs.structure.files import File

    for path, content in generated_pages().items():
        files.append(File.generated(config, path, content=content))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Insert the generated tables into the speed page."""
    return insert_speed_tables(markdown) if page.file.src_uri == SPEED_PAGE else markdown


def insert_speed_tables(markdown: str) -> str:
    """Replace each marker with its table."""
    from megatron_cpt.config.knobs import knobs_table
    from megatron_cpt.launch.environment import variables_table

    for marker, table in zip(SPEED_MARKERS, (knobs_table(), variables_table()), strict=True):
        if marker not in markdown:
            raise ValueError(f"docs/{SPEED_PAGE}: the marker {marker} is missing, so its table has no place; add it")
        markdown = markdown.replace(marker, table)
    return markdown


def generated_pages() -> dict[str, str]:
    """Return path below docs/ -> content of every generated page."""
    return {"reference/commands.md": commands_page(), "reference/run-yaml.md": run_yaml_page(), **api_pages()}


def commands_page() -> str:
    """Return the help text of every command and subcommand."""
    from typer.main import get_command

    from megatron_cpt.cli import app

    lines = ["# Commands", "", "Printed by `megatron-cpt COMMAND --help`. Arguments in capitals stand for your values."]
    for name, text in command_helps(get_command(app), "megatron-cpt"):
        lines += ["", f"## {name}", "", "```text", text.rstrip(), "```"]
    return "\n".join(lines) + "\n"


def command_helps(command: Any, name: str, parent: Any = None) -> Iterator[tuple[str, str]]:
    """Yield name and help text of a command and its subcommands."""
    context = command.context_class(command, info_name=name.split()[-1], parent=parent, terminal_width=100)
    yield name, command.get_help(context)
    for child, subcommand in getattr(command, "commands", {}).items():
        yield from command_helps(subcommand, f"{name} {child}", context)


def run_yaml_page() -> str:
    """Return one table of keys per section of run.yaml, from the JSON schema."""
    schema = run_schema()
    definitions = {name: _object_of(definition) for name, definition in schema["$defs"].items()}
    lines = [
        "# run.yaml",
        "",
        "Every key, its type, its default and its meaning. A key without a default is required.",
        "`megatron-cpt plan --schema` prints the same information as a JSON schema for editors.",
        "An unknown key is an error that names the nearest known key.",
        "",
        "Types: a *count* is `300B`, `2.5M`, `1T`, `1e9` or a number. A *duration* is `3h50m`, `90s` or seconds.",
    ]
    for title, definition in {"Top level": schema, **definitions}.items():
        if definition is None or "properties" not in definition:
            continue
        lines += ["", f"## {_section(title)}", "", definition.get("description", ""), ""]
        required = set(definition.get("required", ()))
        lines += ["| key | type | default | meaning |", "| --- | --- | --- | --- |"]
        for key, field in definition["properties"].items():
            default = "required" if key in required else _default(field)
            meaning = field.get("description") or _referenced_description(field, schema["$defs"])
            cells = (f"`{key}`", _type(field, schema["$defs"]), default, meaning)
            lines.append("| " + " | ".join(" ".join(cell.replace("|", "\\|").split()) for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def _object_of(definition: dict[str, Any]) -> dict[str, Any] | None:
    """Return the alternative of a definition that has keys, or None for a plain value such as an enumeration."""
    alternatives = [definition, *definition.get("anyOf", ())]
    return next((alternative for alternative in alternatives if "properties" in alternative), None)


def _section(name: str) -> str:
    return name.removesuffix("Config")


def _type(field: dict[str, Any], definitions: dict[str, Any]) -> str:
    if "$ref" in field:
        name = field["$ref"].rpartition("/")[2]
        definition = definitions[name]
        if _object_of(definition) is None:
            return _type(definition, definitions)
        return f"[{_section(name)}](#{_section(name).lower()})"
    if "enum" in field or "const" in field:
        return " | ".join(f"`{value}`" for value in field.get("enum", [field.get("const")]))
    text = field.get("description", "")
    if text.startswith("a count"):
        return "count"
    if text.startswith("a length of time"):
        return "duration"
    if "anyOf" in field:
        options = [_type(option, definitions) for option in field["anyOf"]]
        if "pattern" in options or options[:3] == ["integer", "number", "string"]:
            return "count"
        return " or ".join(dict.fromkeys(option for option in options if option != "null"))
    if field.get("type") == "array":
        items = field.get("items") or (field.get("prefixItems") or [{}])[0]
        return f"list of {_type(items, definitions)}"
    if field.get("type") == "object":
        values = field.get("additionalProperties")
        return f"map of name to {_type(values, definitions)}" if isinstance(values, dict) else "object"
    return str(field.get("type", "any"))


def _default(field: dict[str, Any]) -> str:
    if "default" not in field:
        return "defaults of the section" if "$ref" in field else "-"
    value = field["default"]
    return "none" if value is None else f"`{str(value).lower() if isinstance(value, bool) else value}`"


def _referenced_description(field: dict[str, Any], definitions: dict[str, Any]) -> str:
    reference = next((option["$ref"] for option in [field, *field.get("anyOf", ())] if "$ref" in option), None)
    if reference is None:
        return ""
    definition = definitions[reference.rpartition("/")[2]]
    return str((_object_of(definition) or definition).get("description", ""))


def api_pages() -> dict[str, str]:
    """Return path -> content, one page per public name that is a class or a function."""
    pages = {}
    for name in megatron_cpt.__all__:
        value = getattr(megatron_cpt, name)
        if hasattr(value, "__qualname__"):
            identifier = f"{value.__module__}.{value.__qualname__}"
            pages[f"reference/api/{name}.md"] = (
                f"# {name}\n\n::: {identifier}\n    options:\n      show_root_heading: false\n"
            )
    return pages


if __name__ == "__main__":
    print(generated_pages()[sys.argv[1]])
