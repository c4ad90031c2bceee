"""Results that a notebook shows as a terminal would."""

from __future__ import annotations

import html
import json
from typing import Any


class Told:
    """A result whose text is a table or a picture in characters, and whose numbers are plain."""

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers and text, as JSON takes them."""
        raise NotImplementedError

    def to_json(self, indent: int | None = None) -> str:
        """`to_dict` as JSON."""
        return json.dumps(self.to_dict(), indent=indent, allow_nan=False)

    def _repr_html_(self) -> str:
        """The text as it is, in letters of one width.

        Example:
            >>> class Two(Told):
            ...     def __str__(self):
            ...         return "1 < 2"
            >>> Two()._repr_html_()
            '<pre style="line-height: 1.25">1 &lt; 2</pre>'
        """
        return f'<pre style="line-height: 1.25">{html.escape(str(self))}</pre>'
