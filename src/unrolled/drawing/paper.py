"""Pictures for papers: the network and each chart as vectors, or as pixels at print size."""

from __future__ import annotations

import importlib
import io
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from unrolled.drawing.lettering import printable, shortened
from unrolled.drawing.portrait import Chart, Series
from unrolled.errors import OptionError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PICTURES = (".svg", ".png", ".pdf")
"""What a picture can be, by its file's suffix."""

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
    vl_convert = required("vl_convert", "this picture needs vl-convert-python")
    # Three pixels for each of the picture's own: 288 per inch.
    return bytes(vl_convert.svg_to_png(svg, scale=3.0) if ending == ".png" else vl_convert.svg_to_pdf(svg))


def chart_picture(chart: Chart, ending: str) -> bytes:
    """A chart as a picture of its own.

    Args:
        chart: the chart.
        ending: '.svg', '.png' or '.pdf'.

    Raises:
        OptionError: if what draws it is not installed.
    """
    with _style():
        file, undated = io.BytesIO(), {".svg": {"Date": None}, ".pdf": {"CreationDate": None}, ".png": {}}[ending]
        figure_of(chart).savefig(file, format=ending[1:], dpi=288, metadata=undated)
        return file.getvalue()


def figure_of(chart: Chart) -> Figure:
    """A chart as a figure of matplotlib's, as wide as a column of a paper.

    Args:
        chart: the chart.

    Raises:
        OptionError: if matplotlib is not installed.
    """
    with _style():
        return _ChartFigure(chart).figure


def required(module: str, need: str) -> Any:
    """A module that drawing needs, imported.

    Args:
        module: its name.
        need: what needs which package.

    Raises:
        OptionError: if it is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise OptionError(f"{need}, which is not installed; get it with: pip install 'unrolled[draw]'") from error


def _style() -> Any:
    return required("matplotlib", "this picture needs matplotlib").rc_context(_STYLE)


class _ChartFigure:
    """A figure with the axes of one chart."""

    _LONGEST = 60  # letters of a name

    def __init__(self, chart: Chart) -> None:
        from matplotlib.figure import Figure

        self.chart = chart
        self.figure = Figure(figsize=(4.8, 2.9), layout="constrained")
        self.axes: Axes = self.figure.subplots()
        colours = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00")
        for series, colour in zip(chart.series, colours, strict=False):
            if chart.points:
                self._add_points(series, colour)
            else:
                self._add_line(series, colour)
        self._set_scales()
        self.figure.suptitle(chart.title, x=0.01, ha="left", fontweight="bold", fontsize=9.0, parse_math=False)
        self.axes.set_title(chart.y_title, loc="left", fontsize=8.0, color="#59636e", parse_math=False)
        self.axes.set_xlabel(chart.x_title, parse_math=False)
        if len(chart.series) > 1:
            self._add_legend()

    def _add_line(self, series: Series, colour: str) -> None:
        x, marker = self.chart.x, "o" if len(self.chart.x) < 40 else ""
        name = shortened(printable(series.name), self._LONGEST)
        self.axes.plot(x, _with_gaps(series.y), color=colour, marker=marker, label=name)
        if series.lower:
            band = _with_gaps(series.lower), _with_gaps(series.upper)
            self.axes.fill_between(x, *band, color=colour, alpha=0.2, linewidth=0)

    def _add_points(self, series: Series, colour: str) -> None:
        for n, (x, y) in enumerate(zip(self.chart.x, _with_gaps(series.y), strict=True)):
            size, fill = (8.0, "full") if n == self.chart.chosen else (6.0, "none")
            self.axes.plot(x, y, "o", markersize=size, color=colour, fillstyle=fill)
            if n == self.chart.chosen and self.chart.labels:
                label, above = self.chart.labels[n], (0, 9)
                self.axes.annotate(label, (x, y), above, textcoords="offset points", ha="center", parse_math=False)

    def _set_scales(self) -> None:
        from matplotlib.ticker import EngFormatter, LogLocator, MaxNLocator, NullFormatter, PercentFormatter

        chart, axes = self.chart, self.axes
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

    def _add_legend(self) -> None:
        """Names below the chart, in as many columns as the 78 letters across it leave room for."""
        longest = max(len(shortened(series.name, self._LONGEST)) for series in self.chart.series)
        columns = max(1, min(len(self.chart.series), 78 // (longest + 6)))
        for text in self.figure.legend(loc="outside lower left", ncols=columns, frameon=False).get_texts():
            text.set_parse_math(False)


def _with_gaps(values: Sequence[float | None]) -> list[float]:
    return [math.nan if value is None else value for value in values]
