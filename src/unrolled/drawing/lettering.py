"""Lettering: names that anybody may have chosen, made printable, measured and shortened."""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Callable


def printable(text: str) -> str:
    """A name with what cannot be shown replaced: control and direction characters, lone surrogates."""
    return "".join("�" if unicodedata.category(c).startswith("C") else c for c in text)


def columns(text: str) -> int:
    """How many columns of a terminal a text takes: two for a wide character, none for a combining one."""
    spacing = [c for c in text if not unicodedata.combining(c)]
    return len(spacing) + sum(unicodedata.east_asian_width(c) in "WF" for c in spacing)


def text_width(text: str, size: float, style: str = "") -> float:
    """An upper bound of how wide a text is drawn, whatever font of its style is available.

    Args:
        text: the text.
        size: its font size.
        style: the style's classes; "code" is monospaced, "strong" is heavier.
    """
    widths = (_em_width(character, monospaced="code" in style) for character in text)
    return sum(widths) * size * (1.08 if "strong" in style else 1.0)


def _em_width(character: str, *, monospaced: bool) -> float:
    """An upper bound of a character's width, relative to the font size."""
    if monospaced:
        return 0.63 if character.isascii() else 1.26
    if character in "mwMW@%&" or not character.isascii():
        return 1.0
    if character in "ijlft.,:;'|!I[]()/ ":
        return 0.42
    return 0.74 if character.isupper() else 0.62


def shortened(
    text: str, room: float, measure: Callable[[str], float] = columns, *, middle: bool = False, mark: str = "…"
) -> str:
    """A text cut to fit, with a mark where something is left out.

    Args:
        text: the text.
        room: how much there is, in the units of `measure`.
        measure: how wide a text is.
        middle: whether to leave out the middle and not the end: a dotted name says most at its ends.
        mark: what stands for the part left out.
    """
    if measure(text) <= room:
        return text
    kept = len(text) - 1
    while True:
        tail = kept // 2 if middle else 0
        cut = text[: kept - tail] + mark + (text[-tail:] if tail else "")
        width = measure(cut)
        if kept <= 0 or width <= room:
            return cut
        # A name may have a million characters: the first guesses are proportional, the last ones exact.
        kept = min(kept - 1, math.ceil(kept * room / width) + 2)
