"""Lettering: names that anybody may have chosen, made printable, measured and shortened."""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Callable

ELLIPSIS = "…"

_NARROW = frozenset("ijlft.,:;'|!I[]()/ ")
_BROAD = frozenset("mwMW@%&…")


def printable(text: str) -> str:
    """A name with what cannot be shown replaced: control and direction characters, lone surrogates."""
    return "".join("�" if unicodedata.category(c).startswith("C") else c for c in text)


def columns(text: str) -> int:
    """How many columns of a terminal a text takes."""
    return sum(_cells(c) for c in text)


def _cells(character: str) -> int:
    if unicodedata.combining(character):
        return 0
    return 2 if unicodedata.east_asian_width(character) in "WF" else 1


def extent(text: str, size: float, style: str = "") -> float:
    """An upper bound of how wide a text is drawn, whatever font of its style is at hand.

    Args:
        text: the text.
        size: its font size.
        style: the style's classes; "code" is monospaced, "strong" is heavier.
    """
    em = _monospaced if "code" in style else _proportional
    return sum(map(em, text)) * size * (1.08 if "strong" in style else 1.0)


def _monospaced(character: str) -> float:
    return 0.63 if character.isascii() else 1.26


def _proportional(character: str) -> float:
    if character in _BROAD or not character.isascii():
        return 1.0
    if character in _NARROW:
        return 0.42
    return 0.74 if character.isupper() else 0.62


def shortened(
    text: str, room: float, measure: Callable[[str], float] = columns, *, middle: bool = False, mark: str = ELLIPSIS
) -> str:
    """A text cut to fit, with a mark where something is left out.

    Args:
        text: the text.
        room: how much there is, in the units of `measure`.
        measure: how wide a text is.
        middle: whether to leave out the middle and not the end: a dotted name tells most at its ends.
        mark: what stands for the part left out.
    """
    if measure(text) <= room:
        return text
    kept = len(text) - 1
    while kept > 0 and measure(_cut(text, kept, middle, mark)) > room:
        # Names of a million characters are cut too: the first guesses are proportional, the last ones exact.
        kept = min(kept - 1, math.ceil(kept * room / measure(_cut(text, kept, middle, mark))) + 2)
    return _cut(text, kept, middle, mark)


def _cut(text: str, kept: int, middle: bool, mark: str) -> str:
    tail = kept // 2 if middle else 0
    return text[: kept - tail] + mark + (text[-tail:] if tail else "")


def listed(shape: tuple[int, ...]) -> str:
    """A shape as torch prints it: `[32, 128]`, `[]` for a scalar."""
    return str(list(shape))
