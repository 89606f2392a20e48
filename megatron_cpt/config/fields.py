"""The schema of run.yaml as a tree, so that a problem can be told from the key it is at."""

from __future__ import annotations

import difflib
import types
import typing
from collections.abc import Iterator
from typing import Any

from pydantic import BaseModel

from megatron_cpt.config.schema import RunConfig

Path = tuple[str | int, ...]


def dotted(path: Path) -> str:
    """A path as the user would write it: phases[0].blend.web."""
    text = ""
    for key in path:
        text += f"[{key}]" if isinstance(key, int) else f".{key}" if text else str(key)
    return text


def key_path(location: tuple[str | int, ...]) -> Path:
    """The keys of run.yaml in a location of pydantic, which also names the branches of unions."""
    path: list[str | int] = []
    annotation: Any = RunConfig
    for key in location:
        annotation, is_key = _step(annotation, key)
        if is_key:
            path.append(key)
    return tuple(path)


def section_at(path: Path) -> type[BaseModel] | None:
    """The section that a path leads to, if it leads to one."""
    annotation: Any = RunConfig
    for key in path:
        annotation, _ = _step(annotation, key)
    return _section(annotation)


def key_help(path: Path) -> str:
    """The first line of what the schema says about a key; empty where it says nothing."""
    section = section_at(path[:-1])
    for name, info in section.model_fields.items() if section else ():
        if path[-1] in (name, info.alias) and info.description:
            return info.description.splitlines()[0].rstrip(".")
    return ""


def nearest_key(path: Path) -> str:
    """What a key that is not known may have been meant to be."""
    section = section_at(path[:-1])
    known = [info.alias or name for name, info in section.model_fields.items()] if section else []
    elsewhere = next((f"{name}.{key}" for name, key in _keys_of_sections() if key == path[-1]), None)
    if elsewhere:
        return f"did you mean {elsewhere}?"
    near = difflib.get_close_matches(str(path[-1]), known, n=1) or [key for key in known if path[-1] in key.split("_")]
    if near:
        return f"did you mean {dotted((*path[:-1], near[0]))}?"
    return f"known here: {', '.join(known)}"


def _step(annotation: Any, key: str | int) -> tuple[Any, bool]:
    """From the annotation of a value to that of one entry; whether `key` was a key and not the name of a branch."""
    section = _section(annotation)
    if section is not None:
        found = next((info for name, info in section.model_fields.items() if key in (name, info.alias)), None)
        return (found.annotation if found else None), True
    options = _options(annotation)
    for option in options:
        origin, arguments = typing.get_origin(option), typing.get_args(option)
        if origin is dict:
            return arguments[1], True
        if origin in (list, tuple) and isinstance(key, int):
            return arguments[0], True
    # The name of a branch such as `list[str]`: what follows is an index into it.
    return annotation, False


def _options(annotation: Any) -> list[Any]:
    """The branches of a union, without None; a plain annotation is its own only branch."""
    if typing.get_origin(annotation) is typing.Annotated:
        return _options(typing.get_args(annotation)[0])
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        arguments = typing.get_args(annotation)
        return [option for a in arguments if a is not types.NoneType for option in _options(a)]
    return [annotation]


def _section(annotation: Any) -> type[BaseModel] | None:
    for option in _options(annotation):
        if isinstance(option, type) and issubclass(option, BaseModel):
            return option
    return None


def _keys_of_sections() -> Iterator[tuple[str, str]]:
    for name, info in RunConfig.model_fields.items():
        section = _section(info.annotation)
        for key, inner in section.model_fields.items() if section else ():
            yield name, inner.alias or key
