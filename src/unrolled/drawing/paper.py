"""Pictures for papers: the network and each chart as vectors, or as pixels at print size."""

from __future__ import annotations

import json
from typing import Any

from unrolled.drawing.portrait import Chart
from unrolled.drawing.vega import rows, specification
from unrolled.errors import OptionError

__all__ = ["converted", "picture"]

_SCALE = 3.0
"""Pixels of a .png for each of the picture's own: 288 per inch."""

_PLAIN = {
    "background": "white",
    "font": "Helvetica, Arial, sans-serif",
    "line": {"color": "#0072b2"},
    "area": {"color": "#0072b2"},
    "point": {"color": "#0072b2"},
    "view": {"stroke": None},
    "range": {"category": ["#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00"]},
}


def converted(svg: str, ending: str) -> bytes:
    """An SVG picture as the file of an ending.

    Args:
        svg: the picture.
        ending: '.svg', '.png' or '.pdf'.

    Raises:
        OptionError: if what converts it is not installed.
    """
    if ending == ".svg":
        return svg.encode()
    convert = _converter()
    return bytes(convert.svg_to_png(svg, scale=_SCALE) if ending == ".png" else convert.svg_to_pdf(svg))


def picture(chart: Chart, ending: str) -> bytes:
    """A chart as a picture of its own.

    Args:
        chart: the chart.
        ending: '.svg', '.png' or '.pdf'.

    Raises:
        OptionError: for another ending, or if what draws it is not installed.
    """
    if ending not in (".svg", ".png", ".pdf"):
        raise OptionError(f"a chart is drawn as .svg, .png or .pdf, got {ending!r}; a page (.html) has all of them")
    plain = {**specification(chart), "data": {"values": rows(chart)}, "config": _PLAIN, "title": chart.title}
    plain |= {"width": 460, "height": 240}
    if chart.by_copy:
        plain["layer"] = plain["layer"][:-1]  # nobody chooses a copy on paper
    return converted(str(_converter().vegalite_to_svg(json.dumps(plain))), ending)


def _converter() -> Any:
    try:
        import vl_convert
    except ImportError as error:
        raise OptionError(
            "this picture needs vl-convert-python, which is not installed; get it with: pip install 'unrolled[draw]'"
        ) from error
    return vl_convert
