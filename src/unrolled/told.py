"""Results that a notebook shows as a terminal would."""

from __future__ import annotations

import html

__all__ = ["Told"]


class Told:
    """A result whose text is a table or a picture in characters."""

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
