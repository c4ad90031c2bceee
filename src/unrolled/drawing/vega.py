"""Charts as Vega-Lite specifications, for a page that draws them itself."""

from __future__ import annotations

from typing import Any

from unrolled.drawing.portrait import Chart


def _raised(power: str) -> str:
    """A Vega expression that writes a whole number as an exponent; d3's minus sign is U+2212."""
    for plain, small in zip("−0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹", strict=True):
        power = f"replace({power}, /{plain}/g, '{small}')"
    return power


_LOG = "log(datum.value) / LN10"
_IS_POWER = f"abs({_LOG}) > 2.5 && abs({_LOG} - round({_LOG})) < 1e-6"
_POWERS = f"{_IS_POWER} ? '10' + " + _raised(f"format(round({_LOG}), 'd')") + " : format(datum.value, '~g')"
_BYTES = "format(datum.value, '~s') + 'B'"


def specification(chart: Chart) -> dict[str, Any]:
    """A chart as Vega-Lite, without its numbers: these are the data named 'figures'.

    That is one row for each position of each series: `x`, `y`, `low`, `high`, `series`, `label`, `chosen`. Where there
    is no number, `y` is null, and a line is broken. The parameter `copy` is the copy that is chosen.

    Args:
        chart: the chart.
    """
    layers = [_band(chart)] if any(series.lower for series in chart.series) else []
    layers.append(_points(chart) if chart.points else _lines(chart))
    if chart.by_copy:
        layers.append(_marker())
    return {
        "width": "container",
        "height": 190 if len(chart.series) == 1 else 220,
        "autosize": {"type": "fit", "contains": "padding"},
        "params": [{"name": "copy", "value": 0}],
        "data": {"name": "figures"},
        "layer": layers,
    }


def _axis(title: str, *, log: bool) -> dict[str, Any]:
    scale = {"type": "log"} if log else {"zero": False, "nice": True}
    axis = {"tickCount": 4, "labelExpr": _BYTES if "bytes" in title else _POWERS} if log else {"tickCount": 5}
    return {"type": "quantitative", "title": title, "scale": scale, "axis": axis}


def _y(chart: Chart, field: str) -> dict[str, Any]:
    """The y axis; its title stands above it, where it is read without turning the head, and is never cut."""
    found = {"field": field, **_axis(chart.y_title, log=chart.log_y)}
    above = {"titleAngle": 0, "titleAlign": "left", "titleBaseline": "bottom", "titleX": 0, "titleY": -8}
    if chart.share:
        found["scale"] = {"domain": [0, 1]}
        above["format"] = ".0%"
    return {**found, "axis": found["axis"] | above}


def _x(chart: Chart) -> dict[str, Any]:
    found = {"field": "x", **_axis(chart.x_title, log=chart.log_x)}
    return found if chart.log_x else found | {"scale": {"domain": [chart.x[0], max(chart.x[-1], chart.x[0] + 1)]}}


def _colour(chart: Chart) -> dict[str, Any]:
    if len(chart.series) == 1:
        return {}
    return {
        "color": {"field": "series", "type": "nominal", "title": None, "legend": {"orient": "bottom"}, "sort": None}
    }


def _lines(chart: Chart) -> dict[str, Any]:
    y = _y(chart, "y")
    tooltip = [{"field": "x", "title": chart.x_title}, {"field": "y", "title": chart.y_title, "format": ".3g"}]
    tooltip += [{"field": "series", "title": "of"}] if len(chart.series) > 1 else []
    mark = {"type": "line", "interpolate": "linear", "strokeWidth": 1.8, "point": len(chart.x) < 40, "clip": True}
    return {"mark": mark, "encoding": {"x": _x(chart), "y": y, "tooltip": tooltip, **_colour(chart)}}


def _points(chart: Chart) -> dict[str, Any]:
    y = _y(chart, "y")
    tooltip = [
        {"field": "label", "title": "schedule"},
        {"field": "x", "format": ".3s"},
        {"field": "y", "format": ".3g"},
    ]
    chosen = {"condition": {"test": "datum.chosen", "value": 1}, "value": 0.15}
    size = {"condition": {"test": "datum.chosen", "value": 160}, "value": 70}
    mark = {"type": "point", "filled": True, "stroke": "currentColor"}
    encoding = {"x": _x(chart), "y": y, "tooltip": tooltip, "fillOpacity": chosen, "size": size}
    return {"mark": mark, "encoding": encoding}


def _band(chart: Chart) -> dict[str, Any]:
    y = _y(chart, "low")
    mark = {"type": "area", "opacity": 0.22, "clip": True}
    return {"mark": mark, "encoding": {"x": _x(chart), "y": y, "y2": {"field": "high"}, **_colour(chart)}}


def _marker() -> dict[str, Any]:
    """A line at the copy that is chosen."""
    return {
        "data": {"values": [{}]},
        "transform": [{"calculate": "copy", "as": "at"}],
        "mark": {"type": "rule", "strokeWidth": 2, "strokeDash": [4, 3], "clip": True},
        "encoding": {"x": {"field": "at", "type": "quantitative"}},
    }
