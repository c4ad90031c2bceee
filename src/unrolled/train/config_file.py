"""Options out of a JSON or YAML file, as data only."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import yaml

from unrolled.errors import ConfigError

_MOST_BYTES, _MOST_SAID = 100_000, 200


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
        values = _parse(_text_of(path), is_json=path.suffix == ".json")
    except RecursionError as error:
        raise ConfigError(
            f"config file {path} cannot be read: it is nested too deep; options are plain values"
        ) from error
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ConfigError(f"config file {path} cannot be read: {error!s:.{_MOST_SAID}}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"config file {path} must hold one mapping of options, got a {type(values).__name__}")
    return values


def _text_of(path: Path) -> str:
    size = path.stat().st_size
    if size > _MOST_BYTES:
        raise ValueError(
            f"a config file has at most {_MOST_BYTES} bytes, got {size}; it holds some options and no data"
        )
    return path.read_text(encoding="utf-8")


def _parse(text: str, *, is_json: bool) -> Any:
    if is_json:
        return json.loads(text, object_pairs_hook=_named_once)
    return yaml.load(text, _Loader)


def _named_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    _refuse_repeated([name for name, _ in pairs])
    return dict(pairs)


def _refuse_repeated(names: list[str]) -> None:
    """Both parsers would take the last of the values without a word."""
    seen: set[str] = set()
    for name in names:
        if name in seen:
            raise ValueError(f"an option stands there once, got {name!r:.80} twice; leave one of them out")
        seen.add(name)


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
        _refuse_repeated([str(key.value) for key, _ in node.value])
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?$"),
    list("-+.0123456789"),
)
