"""YAML for run.yaml: 1e-4 is a number, and a duplicate key is an error."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from megatron_cpt.errors import ConfigError, UserError
from megatron_cpt.files.retry import is_path_error
from megatron_cpt.files.whole_io import read_text

_MAX_INT = 2**63 - 1
_MAX_LEVELS = 32
_MAX_VALUES = 1_000_000


class _Loader(yaml.SafeLoader):
    """SafeLoader with floats of YAML 1.2, keys that are always text, no duplicate keys and integers of 64 bits."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node: yaml.MappingNode = super().compose_mapping_node(anchor)
        seen: set[str] = set()
        for key_node, _ in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                raise yaml.constructor.ConstructorError(None, None, "a key must be plain text", key_node.start_mark)
            if key_node.value in seen:
                problem = f"key {key_node.value!r} is given twice"
                raise yaml.constructor.ConstructorError(None, None, problem, key_node.start_mark)
            seen.add(key_node.value)
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        # A source may be called 2024 or on: keys are never converted to numbers or booleans.
        self.flatten_mapping(node)
        return {key.value: self.construct_object(value, deep=deep) for key, value in node.value}

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        try:
            value = int(super().construct_yaml_int(node))
        except ValueError:  # Python refuses to parse integers of more than 4,300 digits
            value = _MAX_INT + 1
        if abs(value) > _MAX_INT:
            shown = node.value if len(node.value) < 30 else f"{node.value[:27]}..."
            raise yaml.constructor.ConstructorError(None, None, f"{shown} is too large for 64 bits", node.start_mark)
        return value


_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_yaml_int)


class _Dumper(yaml.SafeDumper):
    """SafeDumper that quotes text which `_Loader` would read as a number."""


# PyYAML follows YAML 1.1, where 1e-4 without a dot is text, but learning rates are often written so.
_FLOAT = re.compile(r"[-+]?(?:[0-9][0-9_]*)(?:\.[0-9_]*)?[eE][-+]?[0-9]+$")
for _side in (_Loader, _Dumper):
    _side.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+0123456789"))


def parse_yaml(text: str, where: str) -> Any:
    """Parse YAML text.

    Args:
        where: name of the text in error messages.

    Raises:
        ConfigError: if it is not valid YAML.
    """
    try:
        data = yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f" (line {mark.line + 1}, column {mark.column + 1})" if mark else ""
        problem = getattr(error, "problem", None) or " ".join(str(error).split())
        raise ConfigError(where, [f"not valid YAML: {problem}{place}"]) from error
    except (ValueError, RecursionError) as error:  # dates such as 2024-13-01; a thousand nested brackets
        raise ConfigError(where, [f"not valid YAML: {error}"]) from error
    _check_size(data, where)
    return data


def _check_size(data: Any, where: str) -> None:
    """Refuse anchors that contain themselves, or that expand a few lines to a billion values."""
    level, count = [data], 0
    for _ in range(_MAX_LEVELS):
        inner: list[Any] = []
        for value in level:
            entries = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
            count += len(entries)
            if count > _MAX_VALUES:
                raise ConfigError(where, [f"more than {_MAX_VALUES:,} values; use anchors less often"])
            inner.extend(entries)
        level = inner
    if level:
        raise ConfigError(
            where, [f"nested more than {_MAX_LEVELS} levels deep; remove anchors that contain themselves"]
        )


def read_mapping(path: str | Path) -> dict[str, Any]:
    """Read a YAML file that contains a mapping.

    Raises:
        UserError: if the file cannot be read.
        ConfigError: if it is not YAML or not a mapping.
    """
    try:
        text = read_text(path)
    except OSError as error:
        if not is_path_error(error):
            raise
        raise UserError(f"{path}: cannot be read: {error.strerror}; give the path of a run.yaml") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text ({error.reason}); give the path of a run.yaml") from error
    data = parse_yaml(text, str(path))
    if not isinstance(data, dict):
        raise ConfigError(str(path), ["not a mapping of keys to values; see examples/quickstart/recipe.yaml"])
    return data


def dump_yaml(data: dict[str, Any]) -> str:
    """Return plain values as YAML text, in their order."""
    text: str = yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)
    return text
