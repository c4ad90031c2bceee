"""Charts as Vega-Lite specifications, for a page that draws them itself."""

from __future__ import annotations

from typing import Any

from unrolled.drawing.portrait import Chart, Series

__all__ = ["rows", "specification"]


def specification(chart: Chart) -> dict[str, Any]:
    """A chart as Vega-Lite, without its numbers: these are the data named 'figures', rows as `rows` gives them.

    Its parameter `copy` is the copy that is chosen.

    Args:
        chart: the chart.
    """
    layers = [_band(chart)] if any(series.lower for series in chart.series) else []
    layers.append(_points(chart) if chart.points else _lines(chart))
    if chart.by_copy:
        layers.append(_marker())
    return {
        "width": "container",
        "height": 190,
        "autosize": {"type": "fit", "contains": "padding"},
        "params": [{"name": "copy", "value": 0}],
        "data": {"name": "figures"},
        "layer": layers,
    }


def rows(chart: Chart) -> list[dict[str, Any]]:
    """A chart's numbers, one row for each position of each series; what a logarithmic axis lacks is left out."""
    return [row for series in chart.series for row in _rows(chart, series)]


def _rows(chart: Chart, series: Series) -> list[dict[str, Any]]:
    bands = zip(series.lower or series.y, series.upper or series.y, strict=True)
    labels = chart.labels or ("",) * len(chart.x)
    rows = zip(chart.x, series.y, bands, labels, range(len(chart.x)), strict=True)
    return [
        {"x": x, "y": y, "low": low, "high": high, "series": series.name, "label": label, "chosen": n == chart.chosen}
        for x, y, (low, high), label, n in rows
        if _shown(chart, x, y)
    ]


def _shown(chart: Chart, x: float, y: float | None) -> bool:
    return y is not None and not (chart.log_y and y <= 0) and not (chart.log_x and x <= 0)


def _axis(title: str, *, log: bool) -> dict[str, Any]:
    scale = {"type": "log"} if log else {"zero": False, "nice": True}
    axis = {"format": "~s" if "bytes" in title else ".0e", "tickCount": 4} if log else {"tickCount": 5}
    return {"type": "quantitative", "title": title, "scale": scale, "axis": axis}


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
    y = {"field": "y", **_axis(chart.y_title, log=chart.log_y)}
    tooltip = [{"field": "x", "title": chart.x_title}, {"field": "y", "title": chart.y_title, "format": ".3g"}]
    tooltip += [{"field": "series", "title": "of"}] if len(chart.series) > 1 else []
    mark = {"type": "line", "interpolate": "linear", "strokeWidth": 1.8, "point": len(chart.x) < 40, "clip": True}
    return {"mark": mark, "encoding": {"x": _x(chart), "y": y, "tooltip": tooltip, **_colour(chart)}}


def _points(chart: Chart) -> dict[str, Any]:
    y = {"field": "y", **_axis(chart.y_title, log=chart.log_y)}
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
    axis = _axis(chart.y_title, log=chart.log_y)
    y = {"field": "low", **axis}
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
