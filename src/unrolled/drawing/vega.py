"""Charts as Vega-Lite specifications, for a page that draws them itself."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from unrolled.drawing.portrait import Chart


def specification(chart: Chart) -> dict[str, Any]:
    """A chart as Vega-Lite, without its numbers: these are the data named 'figures'.

    That is one row for each position of each series: `x`, `y`, `low`, `high`, `series`, `label`, `chosen`. Where there
    is no number, `y` is null, and a line is broken. The parameter `copy` is the copy that is chosen.

    Args:
        chart: the chart.
    """
    layers = _Layers(chart)
    drawn = [layers.band()] if any(series.lower for series in chart.series) else []
    drawn.append(layers.points() if chart.points else layers.lines())
    if chart.by_copy:
        drawn.append(layers.chosen_copy())
    return {
        "width": "container",
        "height": 190 if len(chart.series) == 1 else 220,
        "autosize": {"type": "fit", "contains": "padding"},
        "params": [{"name": "copy", "value": 0}],
        "data": {"name": "figures"},
        "layer": drawn,
    }


@dataclass(frozen=True)
class _Layers:
    """What is drawn on top of each other in a chart, and the encodings that they share."""

    chart: Chart

    def band(self) -> dict[str, Any]:
        mark = {"type": "area", "opacity": 0.22, "clip": True}
        return {"mark": mark, "encoding": {"x": self._x(), "y": self._y("low"), "y2": {"field": "high"}, **self._hue()}}

    def lines(self) -> dict[str, Any]:
        chart = self.chart
        tooltip = [{"field": "x", "title": chart.x_title}, {"field": "y", "title": chart.y_title, "format": ".3g"}]
        tooltip += [{"field": "series", "title": "of"}] if len(chart.series) > 1 else []
        mark = {"type": "line", "interpolate": "linear", "strokeWidth": 1.8, "point": len(chart.x) < 40, "clip": True}
        return {"mark": mark, "encoding": {"x": self._x(), "y": self._y("y"), "tooltip": tooltip, **self._hue()}}

    def points(self) -> dict[str, Any]:
        tooltip = [
            {"field": "label", "title": "schedule"},
            {"field": "x", "format": ".3s"},
            {"field": "y", "format": ".3g"},
        ]
        opacity = {"condition": {"test": "datum.chosen", "value": 1}, "value": 0.15}
        size = {"condition": {"test": "datum.chosen", "value": 160}, "value": 70}
        mark = {"type": "point", "filled": True, "stroke": "currentColor"}
        encoding = {"x": self._x(), "y": self._y("y"), "tooltip": tooltip, "fillOpacity": opacity, "size": size}
        return {"mark": mark, "encoding": encoding}

    def chosen_copy(self) -> dict[str, Any]:
        """A line at the copy that is chosen."""
        return {
            "data": {"values": [{}]},
            "transform": [{"calculate": "copy", "as": "at"}],
            "mark": {"type": "rule", "strokeWidth": 2, "strokeDash": [4, 3], "clip": True},
            "encoding": {"x": {"field": "at", "type": "quantitative"}},
        }

    def _x(self) -> dict[str, Any]:
        chart, encoding = self.chart, {"field": "x", **_axis(self.chart.x_title, log=self.chart.log_x)}
        if not chart.log_x:
            encoding["scale"] = {"domain": [chart.x[0], max(chart.x[-1], chart.x[0] + 1)]}
        return encoding

    def _y(self, field: str) -> dict[str, Any]:
        """The y axis; its title stands above it, where it is read without turning the head, and is never cut."""
        encoding = {"field": field, **_axis(self.chart.y_title, log=self.chart.log_y)}
        above = {"titleAngle": 0, "titleAlign": "left", "titleBaseline": "bottom", "titleX": 0, "titleY": -8}
        if self.chart.share:
            encoding["scale"] = {"domain": [0, 1]}
            above["format"] = ".0%"
        return {**encoding, "axis": encoding["axis"] | above}

    def _hue(self) -> dict[str, Any]:
        """A colour for each series, where there are several."""
        if len(self.chart.series) == 1:
            return {}
        legend = {"title": None, "legend": {"orient": "bottom"}, "sort": None}
        return {"color": {"field": "series", "type": "nominal", **legend}}


def _axis(title: str, *, log: bool) -> dict[str, Any]:
    scale = {"type": "log"} if log else {"zero": False, "nice": True}
    label = "format(datum.value, '~s') + 'B'" if "bytes" in title else _power_label()
    axis = {"tickCount": 4, "labelExpr": label} if log else {"tickCount": 5}
    return {"type": "quantitative", "title": title, "scale": scale, "axis": axis}


def _power_label() -> str:
    """A Vega expression for a label: a power of ten, from 1000 on and from 0.001 down, has an exponent."""
    log = "log(datum.value) / LN10"
    exponent = f"format(round({log}), 'd')"
    for plain, small in zip("−0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹", strict=True):  # d3's minus sign is U+2212
        exponent = f"replace({exponent}, /{plain}/g, '{small}')"
    is_power = f"abs({log}) > 2.5 && abs({log} - round({log})) < 1e-6"
    return f"{is_power} ? '10' + {exponent} : format(datum.value, '~g')"
