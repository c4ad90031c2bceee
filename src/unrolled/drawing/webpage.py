"""A portrait as one self-contained HTML file: it opens from disk, and loads nothing from the network."""

from __future__ import annotations

import dataclasses
import functools
import json
from importlib import resources
from typing import Any

from unrolled.drawing.inside import inside
from unrolled.drawing.paper import required
from unrolled.drawing.portrait import Chart, Portrait
from unrolled.drawing.vega import specification


def webpage(portrait: Portrait) -> str:
    """The page.

    Args:
        portrait: what it shows.

    Raises:
        OptionError: if the packages that it is made with are not installed.
    """
    jinja2 = required("jinja2", "a page needs jinja2")
    required("vl_convert", "a page needs vl_convert")  # before work starts
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    folder = resources.files("unrolled.drawing") / "page"
    parts = {name: (folder / name).read_text(encoding="utf-8") for name in ("page.css", "page.js")}
    data = portrait.to_dict()
    data["charts"] = [_chart_data(chart) for chart in portrait.charts]
    for entry, layer in zip(data["layers"], portrait.layers, strict=True):
        entry["charts"] = [_chart_data(chart) for chart in layer.charts]
        entry["inside"] = inside(layer.cell, layer.operations, layer.results)
    # No `<` of the data can begin a tag.
    json_text = json.dumps(data, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")
    template = environment.from_string((folder / "page.html.j2").read_text(encoding="utf-8"))
    return template.render(
        portrait=portrait,
        style=environment.filters["safe"](parts["page.css"]),
        script=environment.filters["safe"](parts["page.js"]),
        charts=environment.filters["safe"](_bundle().replace("</script", "<\\/script")),
        data=environment.filters["safe"](json_text),
    )


def _chart_data(chart: Chart) -> dict[str, Any]:
    words = {"key": chart.key, "title": chart.title, "sentence": chart.sentence, "by_copy": chart.by_copy}
    numbers = {"x": chart.x, "log_y": chart.log_y, "labels": chart.labels, "chosen": chart.chosen}
    series = [dataclasses.asdict(series) for series in chart.series]
    return _rounded({**words, **numbers, "series": series, "specification": specification(chart)})


def _rounded(tree: Any) -> Any:
    """Numbers with five digits: more cannot be seen, and a page has many."""
    if isinstance(tree, dict):
        return {name: _rounded(member) for name, member in tree.items()}
    if isinstance(tree, list | tuple):
        return [_rounded(member) for member in tree]
    if isinstance(tree, float):
        return int(tree) if tree.is_integer() and abs(tree) < 1e9 else float(f"{tree:.5g}")
    return tree


@functools.cache
def _bundle() -> str:
    """Vega, Vega-Lite and Vega-Embed as one script, which a page carries."""
    vl_convert = required("vl_convert", "a page needs vl_convert")
    return str(vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;"))
