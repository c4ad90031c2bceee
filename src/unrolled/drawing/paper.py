"""Pictures for papers: the network and each chart as vectors, or as pixels at print size."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

from unrolled.drawing.lettering import printable, shortened
from unrolled.drawing.portrait import Chart, Series
from unrolled.errors import OptionError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PICTURES = (".svg", ".png", ".pdf")
"""What a picture can be, by its file's suffix."""

_SCALE = 3.0
"""Pixels of a network's .png for each of the picture's own: 288 per inch."""

_SIZE = 4.8, 2.9
"""A chart's size in inches: the width of a column."""

_STYLE: Any = {
    "font.size": 8.0,
    "axes.edgecolor": "#59636e",
    "axes.grid": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.color": "#e3e7eb",
    "grid.linewidth": 0.6,
    "lines.linewidth": 1.2,
    "lines.markersize": 3.5,
    "xtick.color": "#59636e",
    "ytick.color": "#59636e",
    "pdf.fonttype": 42,  # letters stay letters: journals refuse the other kind
    "svg.hashsalt": "unrolled",  # the same chart is the same file
}
_COLOURS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00")
_FEW = 40
"""Up to so many positions are marked on a line."""
_LINE, _LONGEST = 78, 60
"""Letters across a chart, and those of a name."""


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
    try:
        import vl_convert
    except ImportError as error:
        raise _missing("vl-convert-python") from error
    return bytes(vl_convert.svg_to_png(svg, scale=_SCALE) if ending == ".png" else vl_convert.svg_to_pdf(svg))


def picture(chart: Chart, ending: str) -> bytes:
    """A chart as a picture of its own.

    Args:
        chart: the chart.
        ending: '.svg', '.png' or '.pdf'.

    Raises:
        OptionError: for another ending, or if what draws it is not installed.
    """
    if ending not in PICTURES:
        raise OptionError(f"a chart is drawn as .svg, .png or .pdf, got {ending!r}; a page (.html) has all of them")
    with _style():
        file, undated = io.BytesIO(), {".svg": {"Date": None}, ".pdf": {"CreationDate": None}, ".png": {}}[ending]
        figure_of(chart).savefig(file, format=ending[1:], dpi=288, metadata=undated)
        return file.getvalue()


def figure_of(chart: Chart) -> Figure:
    """A chart as a figure of matplotlib's.

    Args:
        chart: the chart.

    Raises:
        OptionError: if matplotlib is not installed.
    """
    with _style():
        from matplotlib.figure import Figure

        figure = Figure(figsize=_SIZE, layout="constrained")
        axes = figure.subplots()
        for series, colour in zip(chart.series, _COLOURS, strict=False):
            (_points if chart.points else _line)(axes, chart, series, colour)
        _scales(axes, chart)
        figure.suptitle(chart.title, x=0.01, ha="left", fontweight="bold", fontsize=9.0, parse_math=False)
        axes.set_title(chart.y_title, loc="left", fontsize=8.0, color="#59636e", parse_math=False)
        axes.set_xlabel(chart.x_title, parse_math=False)
        if len(chart.series) > 1:
            _legend(figure, chart)
        return figure


def _style() -> AbstractContextManager[None]:
    try:
        import matplotlib
    except ImportError as error:
        raise _missing("matplotlib") from error
    return matplotlib.rc_context(_STYLE)


def _legend(figure: Figure, chart: Chart) -> None:
    """Names below the chart, in as many columns as they leave room for."""
    longest = max(len(shortened(series.name, _LONGEST)) for series in chart.series)
    columns = max(1, min(len(chart.series), _LINE // (longest + 6)))
    for text in figure.legend(loc="outside lower left", ncols=columns, frameon=False).get_texts():
        text.set_parse_math(False)


def _saved(figure: Any, ending: str) -> bytes:
    file = io.BytesIO()
    undated = {".svg": {"Date": None}, ".pdf": {"CreationDate": None}, ".png": {}}[ending]
    figure.savefig(file, format=ending[1:], dpi=288, metadata=undated)
    return file.getvalue()


def _line(axes: Axes, chart: Chart, series: Series, colour: str) -> None:
    marker = "o" if len(chart.x) < _FEW else ""
    name = shortened(printable(series.name), _LONGEST)
    axes.plot(chart.x, _numbers(series.y), color=colour, marker=marker, label=name)
    if series.lower:
        axes.fill_between(chart.x, _numbers(series.lower), _numbers(series.upper), color=colour, alpha=0.2, linewidth=0)


def _points(axes: Axes, chart: Chart, series: Series, colour: str) -> None:
    for n, (x, y) in enumerate(zip(chart.x, _numbers(series.y), strict=True)):
        full = n == chart.chosen
        axes.plot(x, y, "o", markersize=8.0 if full else 6.0, color=colour, fillstyle="full" if full else "none")
        if full and chart.labels:
            axes.annotate(chart.labels[n], (x, y), (0, 9), textcoords="offset points", ha="center", parse_math=False)


def _scales(axes: Axes, chart: Chart) -> None:
    from matplotlib.ticker import EngFormatter, LogLocator, MaxNLocator, NullFormatter, PercentFormatter

    if chart.log_x:
        axes.set_xscale("log")
        if "bytes" in chart.x_title:
            axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
            axes.xaxis.set_major_formatter(EngFormatter("B"))
            axes.xaxis.set_minor_formatter(NullFormatter())
    else:
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.margins(x=0.01)
    if chart.log_y:
        axes.set_yscale("log")
    if chart.share:
        axes.set_ylim(-0.02, 1.02)
        axes.yaxis.set_major_formatter(PercentFormatter(1.0))


def _numbers(values: Sequence[float | None]) -> list[float]:
    """Numbers, with gaps where there are none."""
    return [math.nan if value is None else value for value in values]


def _missing(package: str) -> OptionError:
    return OptionError(
        f"this picture needs {package}, which is not installed; get it with: pip install 'unrolled[draw]'"
    )
