"""What all results of a diagnosis have in common."""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Any


class Result:
    """What all results can do: turn into a dict, and so into JSON."""

    def to_dict(self) -> dict[str, Any]:
        """The figures by name, nested as the results are; numbers that JSON does not have as 'inf', '-inf', 'nan'."""
        return {
            member.name: plain(getattr(self, member.name))
            for member in dataclasses.fields(self)  # type: ignore[arg-type]
            if member.metadata.get("told", True)
        }

    def to_json(self, indent: int | None = None) -> str:
        """`to_dict` as JSON."""
        return json.dumps(self.to_dict(), indent=indent, allow_nan=False)


def plain(value: Any) -> Any:
    """A figure as JSON takes it."""
    if isinstance(value, Result):
        return value.to_dict()
    if isinstance(value, tuple):
        return [plain(entry) for entry in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
