"""Options out of a JSON or YAML file, as data only."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import yaml

from unrolled.errors import ConfigError


def read_config(path: Path) -> dict[str, Any]:
    """Read options from a JSON or YAML file.

    Args:
        path: a `.json`, `.yaml` or `.yml` file that holds one mapping.

    Returns:
        The mapping, not yet checked against the options.

    Raises:
        ConfigError: if the file cannot be read, is larger than a config can be, holds no mapping, or names an option
            twice.
    """
    if path.suffix not in (".json", ".yaml", ".yml"):
        raise ConfigError(f"a config file ends in .json, .yaml or .yml, got {path.name!r}")
    try:
        values = _parse(path)
    except RecursionError as error:
        raise ConfigError(
            f"config file {path} cannot be read: it is nested too deep; options are plain values"
        ) from error
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ConfigError(f"config file {path} cannot be read: {error!s:.200}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"config file {path} must hold one mapping of options, got a {type(values).__name__}")
    return values


def _parse(path: Path) -> Any:
    most, size = 100_000, path.stat().st_size
    if size > most:
        raise ValueError(f"a config file has at most {most} bytes, got {size}; it holds some options and no data")
    text = path.read_text(encoding="utf-8")
    return json.loads(text, object_pairs_hook=_mapping) if path.suffix == ".json" else yaml.load(text, _Loader)


def _mapping(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A mapping in which a name stands once: both parsers would take the last of its values without a word."""
    mapping: dict[str, Any] = {}
    for name, value in pairs:
        if name in mapping:
            raise ValueError(f"an option stands there once, got {name!r:.80} twice; leave one of them out")
        mapping[name] = value
    return mapping


class _Loader(yaml.SafeLoader):
    """PyYAML's loader of plain data, with two of YAML 1.2's rules: 4e-3 is a number, and a key stands once.

    Aliases are refused: a few lines of them can stand for gigabytes.
    """

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            raise ValueError(f"aliases are not taken, got *{self.peek_event().anchor:.80}; write the value itself")
        found: yaml.Node | None = super().compose_node(parent, index)
        return found

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        _mapping([(str(key.value), None) for key, _ in node.value])
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?$"),
    list("-+.0123456789"),
)
