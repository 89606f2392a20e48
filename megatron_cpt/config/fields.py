"""Keys of run.yaml: lookup by path, for messages, and the JSON schema."""

from __future__ import annotations

import difflib
import types
import typing
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from megatron_cpt.config.model import ACTIVATION_NAMES, GATED_ACTIVATION_NAMES, NORM_NAMES
from megatron_cpt.config.presets import preset_names
from megatron_cpt.config.quantities import COUNT_SCHEMA
from megatron_cpt.config.schema import RunConfig

Path = tuple[str | int, ...]


def dotted(path: Path) -> str:
    """Return a path as text, such as `phases[0].blend.web`."""
    text = ""
    for key in path:
        text += f"[{key}]" if isinstance(key, int) else f".{key}" if text else str(key)
    return text


def key_path(location: tuple[str | int, ...], root: type[BaseModel] = RunConfig) -> Path:
    """Return the keys in an error location of pydantic, without the union branches that it names.

    (`sources`, `web`, `path`, `list[str]`, 1) becomes (`sources`, `web`, `path`, 1).

    Args:
        root: model of the complete file.
    """
    path: list[str | int] = []
    annotation: Any = root
    for key in location:
        annotation, is_key = _descend(annotation, key)
        if is_key:
            path.append(key)
    return tuple(path)


def key_help(path: Path, root: type[BaseModel] = RunConfig) -> str:
    """Return the docstring of a key without its final period; empty if the key is unknown."""
    info = _fields_at(path[:-1], root).get(str(path[-1]))
    return " ".join(((info and info.description) or "").split()).rstrip(".")


def nearest_key(path: Path, root: type[BaseModel] = RunConfig) -> str:
    """Return a hint for an unknown key: the nearest known key, or all keys of its section."""
    known, key = list(_fields_at(path[:-1], root)), path[-1]
    elsewhere = next((name for name, info in root.model_fields.items() if key in _fields(info.annotation)), None)
    if elsewhere:
        return f"did you mean {elsewhere}.{key}?"
    near = difflib.get_close_matches(str(key), known, n=1) or [name for name in known if key in name.split("_")]
    if near:
        return f"did you mean {dotted((*path[:-1], near[0]))}?"
    return f"known here: {', '.join(known)}"


def run_schema() -> dict[str, Any]:
    """Return the JSON schema of run.yaml, with presets and short forms such as `300B`; editors complete with it."""
    schema = RunConfig.model_json_schema(by_alias=True)
    schema["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    schema["required"].remove("model")  # a checkpoint in init.from knows it
    sections = schema["$defs"]
    model = sections["ModelConfig"]
    required = model.pop("required")
    # A preset gives every required field.
    model["anyOf"] = [{"required": ["preset"]}, {"required": required}]
    model["properties"]["preset"]["examples"] = list(preset_names())
    sections["ModelConfig"] = {"anyOf": [{"enum": list(preset_names())}, model]}
    sections["Activation"]["enum"] += [*ACTIVATION_NAMES, *GATED_ACTIVATION_NAMES]
    sections["Norm"]["enum"] += NORM_NAMES
    steps = {"type": "integer", "minimum": 0, "description": "steps"}
    fraction = {"type": "number", "minimum": 0, "maximum": 1, "description": "fraction of the run"}
    sections["Span"] = {"anyOf": [steps, fraction, COUNT_SCHEMA, sections["Span"]]}
    return schema


def _descend(annotation: Any, key: str | int) -> tuple[Any, bool]:
    """Return the annotation of the entry `key`, and False if `key` only names a branch of a union."""
    fields = _fields(annotation)
    if fields:
        return (fields[str(key)].annotation if key in fields else None), True
    for option in _options(annotation):
        origin, arguments = typing.get_origin(option), typing.get_args(option)
        if origin is dict:
            return arguments[1], True
        if origin in (list, tuple) and isinstance(key, int):
            return arguments[0], True
    return annotation, False  # a branch such as `list[str]`; the next key is an index into it


def _options(annotation: Any) -> list[Any]:
    """Return the branches of a union without None, or the annotation itself."""
    if typing.get_origin(annotation) is typing.Annotated:
        return _options(typing.get_args(annotation)[0])
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        arguments = typing.get_args(annotation)
        return [option for a in arguments if a is not types.NoneType for option in _options(a)]
    return [annotation]


def _fields(annotation: Any) -> dict[str, FieldInfo]:
    """Return the fields of a section by their keys in run.yaml; none if the annotation is of a plain value."""
    for option in _options(annotation):
        if isinstance(option, type) and issubclass(option, BaseModel):
            return {info.alias or name: info for name, info in option.model_fields.items()}
    return {}


def _fields_at(path: Path, root: type[BaseModel]) -> dict[str, FieldInfo]:
    annotation: Any = root
    for key in path:
        annotation, _ = _descend(annotation, key)
    return _fields(annotation)
