"""Results: one kind for a terminal, a notebook and JSON."""

from __future__ import annotations

import dataclasses
import html
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any


class Result:
    """What a public function found out: a frozen dataclass of plain numbers and text.

    `str` gives the text for a terminal, a notebook shows the same text, and `to_dict` and `to_json` give the figures.

    Example:
        >>> @dataclasses.dataclass(frozen=True)
        ... class Slope(Result):
        ...     value: float
        >>> Slope(math.inf).to_json(), Slope(0.5)._repr_html_()
        ('{"value": "inf"}', '<pre style="line-height: 1.25">Slope(value=0.5)</pre>')
    """

    def to_dict(self) -> dict[str, Any]:
        """The figures by name, nested as the results are; numbers that JSON does not have as 'inf', '-inf', 'nan'."""
        fields = dataclasses.fields(self)  # type: ignore[arg-type]
        return {field.name: plain(getattr(self, field.name)) for field in fields}

    def to_json(self, indent: int | None = None) -> str:
        """`to_dict` as JSON."""
        return json.dumps(self.to_dict(), indent=indent, allow_nan=False)

    def _repr_html_(self) -> str:
        return f'<pre style="line-height: 1.25">{html.escape(str(self))}</pre>'


def plain(value: Any) -> Any:
    """A figure, or a collection of them, as JSON takes it."""
    if isinstance(value, Result):
        return value.to_dict()
    if isinstance(value, tuple):
        return [plain(entry) for entry in value]
    if isinstance(value, Mapping):
        return {key: plain(entry) for key, entry in value.items()}
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """The lines of a table of text, its columns two spaces apart.

    Example:
        >>> aligned([("engine", "ran"), ("eager", "eager")])
        ['engine  ran', 'eager   eager']
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
