"""Reading and writing of YAML: the one module of the package that parses it.

Values follow the core schema of YAML 1.2 (https://yaml.org/spec/1.2.2/, section 10.3). PyYAML alone would follow YAML
1.1, where `010` is 8, `1:30` is 90 and `no` is false. A plain value that is a number in YAML 1.1 only is refused.
Example: `seq_length: 1_000` is an error that says to write the number in plain digits. `yes` and `off` are text; a key
that takes a boolean refuses them.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import yaml

from megatron_cpt.errors import ConfigError, UserError
from megatron_cpt.files.retry import is_path_error
from megatron_cpt.files.whole_io import open_reader

_MAX_INT = 2**63 - 1
MAX_LEVELS = 32
_MAX_VALUES = 1_000_000
_MAX_BYTES = 16 << 20

_INT = r"[-+]?[0-9]+"
_OCTAL, _HEX = r"0o[0-7]+", r"0x[0-9a-fA-F]+"
_FLOAT = r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?"
_INFINITE = r"[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)"
# Core schema of YAML 1.2: the first pattern that matches a plain value decides; without a match, the value is text.
_CORE_SCHEMA: tuple[tuple[str, Callable[[str], Any]], ...] = (
    ("null|Null|NULL|~|", lambda _: None),
    ("true|True|TRUE|false|False|FALSE", lambda text: text.lower() == "true"),
    (_INT, lambda text: _parse_int(text, 10)),
    (_OCTAL, lambda text: _parse_int(text[2:], 8)),
    (_HEX, lambda text: _parse_int(text[2:], 16)),
    (_FLOAT, float),
    (_INFINITE, lambda text: float(text.replace(".", ""))),
)
_NUMBER_TAGS = ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float")
_NOT_TEXT = re.compile("[\0\ud800-\udfff]")

Schema = Literal["core", "untagged", "text"]


def _parse_int(digits: str, base: int) -> int:
    # Python refuses to parse integers of more than 4,300 digits.
    value = int(digits, base) if len(digits) <= 4000 else _MAX_INT + 1
    if abs(value) > _MAX_INT:
        raise ValueError("is too large for 64 bits")
    return value


class _Loader(yaml.reader.Reader, yaml.scanner.Scanner, yaml.parser.Parser, yaml.composer.Composer):
    """Loader of nodes, which keeps the tags in the file and adds the empty tag to plain values without one."""

    def __init__(self, text: str) -> None:
        yaml.reader.Reader.__init__(self, text)
        yaml.scanner.Scanner.__init__(self)
        yaml.parser.Parser.__init__(self)
        yaml.composer.Composer.__init__(self)

    def resolve(self, kind: type[yaml.Node], value: Any, implicit: Any) -> str:
        return "" if kind is yaml.ScalarNode and implicit[0] else "!"

    def descend_resolver(self, *_: Any) -> None:
        """Do nothing: no tag depends on the place of a node."""

    def ascend_resolver(self) -> None:
        """Do nothing: no tag depends on the place of a node."""


class _Dumper(yaml.SafeDumper):
    """SafeDumper that also quotes text which is a number in YAML 1.2 only, such as 1e9 or 0o10."""


_NUMBER = re.compile(rf"(?:{_OCTAL}|{_FLOAT})$")
_Dumper.add_implicit_resolver("tag:yaml.org,2002:float", _NUMBER, list("-+.0123456789"))


class _Constructor:
    """Conversion of nodes into plain values. It bounds the values that anchors expand to."""

    def __init__(self, schema: Schema) -> None:
        self._schema = schema
        self._num_values = 0
        self._yaml11: Callable[..., str] = yaml.resolver.Resolver().resolve

    def construct(self, node: yaml.Node, level: int = 0) -> Any:
        """Return the value of a node."""
        self._num_values += 1
        if self._num_values > _MAX_VALUES:
            raise _error(node, f"more than {_MAX_VALUES:,} values; use anchors less often")
        if level > MAX_LEVELS:
            raise _error(node, f"nested more than {MAX_LEVELS} levels deep; remove anchors that contain themselves")
        if self._schema == "core" and node.tag not in ("", "!"):
            raise _error(node, f"the tag {node.tag!r} is not supported; remove it, and put text in quotes")
        if isinstance(node, yaml.MappingNode):
            return self._mapping(node, level)
        if isinstance(node, yaml.SequenceNode):
            return [self.construct(entry, level + 1) for entry in node.value]
        if ":python/name:" in node.tag:  # a function becomes its name
            return _checked_text(node, node.tag.rpartition(":")[2])
        text = _checked_text(node, node.value)
        return text if node.tag or self._schema == "text" else self._plain(node, text)

    def _mapping(self, node: yaml.MappingNode, level: int) -> dict[str, Any]:
        """Return a mapping; its keys are always text, because a source may be called 2024 or on."""
        result: dict[str, Any] = {}
        for key_node, value in node.value:
            if not isinstance(key_node, yaml.ScalarNode) or (self._schema == "core" and key_node.tag not in ("", "!")):
                raise _error(key_node, "a key must be plain text")
            key = _checked_text(key_node, key_node.value)
            if key in result:
                raise _error(key_node, f"key {key!r} is given twice")
            if (key, key_node.tag, self._schema) == ("<<", "", "core"):
                raise _error(key_node, "merge keys (<<) are not part of YAML 1.2; write the merged keys out")
            result[key] = self.construct(value, level + 1)
        return result

    def _plain(self, node: yaml.Node, text: str) -> Any:
        for pattern, convert in _CORE_SCHEMA:
            if re.fullmatch(pattern, text):
                try:
                    return convert(text)
                except ValueError as error:
                    raise _error(node, f"{_shorten(text)} {error}") from error
        if self._yaml11(yaml.ScalarNode, text, (True, False)) in _NUMBER_TAGS:
            problem = "is a number in YAML 1.1 only; write it in plain digits, or in quotes if it is text"
            raise _error(node, f"{_shorten(text)} {problem}")
        return text


def _error(node: yaml.Node, problem: str) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(None, None, problem, node.start_mark)


def _shorten(text: str) -> str:
    return text if len(text) < 30 else f"{text[:27]}..."


def _checked_text(node: yaml.Node, text: str) -> str:
    found = _NOT_TEXT.search(text)
    if found:
        raise _error(node, f"the character U+{ord(found[0]):04X} is not allowed; remove it")
    return text


def parse_yaml(text: str, where: str, *, schema: Schema = "core") -> Any:
    """Parse YAML text.

    Args:
        where: name of the text in error messages.
        schema: `core` refuses tags; `untagged` replaces a tagged object by the plain value below the tag, for files in
            which other programs describe Python objects; `text` also takes every value as text.

    Raises:
        ConfigError: the text is not valid YAML, or a value has no clear meaning.
    """
    if len(text) > _MAX_BYTES:
        raise ConfigError(where, [f"{len(text):,} characters, above the limit of {_MAX_BYTES:,}; is it another file?"])
    try:
        node = _Loader(text).get_single_node()
        return None if node is None else _Constructor(schema).construct(node)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f" (line {mark.line + 1}, column {mark.column + 1})" if mark else ""
        problem = getattr(error, "problem", None) or " ".join(str(error).split())
        raise ConfigError(where, [f"not valid YAML: {problem}{place}"]) from error
    except (ValueError, OverflowError, RecursionError) as error:  # "\U00110000"; a thousand nested brackets
        raise ConfigError(where, [f"not valid YAML: {error}"]) from error


def read_mapping(path: str | Path, *, schema: Schema = "core") -> dict[str, Any]:
    """Read a YAML file that contains a mapping; `schema` as in `parse_yaml`.

    Raises:
        UserError: if the file cannot be read.
        ConfigError: if it is not YAML or not a mapping.
    """
    try:
        with open_reader(path) as file:
            text = file.read(_MAX_BYTES + 1).decode()
    except OSError as error:
        if not is_path_error(error):
            raise
        raise UserError(f"{path}: cannot be read: {error.strerror}; give the path of a run.yaml") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text ({error.reason}); give the path of a run.yaml") from error
    except ValueError as error:  # a zero byte in the path
        raise UserError(f"{str(path)!r}: cannot be read: {error}; give the path of a run.yaml") from error
    data = parse_yaml(text, str(path), schema=schema)
    if not isinstance(data, dict):
        raise ConfigError(str(path), ["not a mapping of keys to values; see examples/quickstart/recipe.yaml"])
    return data


def dump_yaml(data: dict[str, Any]) -> str:
    """Return plain values as YAML text, in their order."""
    text: str = yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)
    return text
