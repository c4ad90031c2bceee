"""A sketch as SVG: vector only, text as text, readable on light and on dark paper."""

from __future__ import annotations

import math
import xml.etree.ElementTree as ET
from itertools import accumulate

from unrolled.drawing.figure import MARGIN, Figure
from unrolled.drawing.lettering import printable, shortened
from unrolled.drawing.marks import Bounds, Box, Label, Mark
from unrolled.drawing.sketch import Sketch
from unrolled.drawing.tables import tables

# The hues are those of Okabe and Ito, which people with any colour vision tell apart; on dark paper two are lighter.
_HUES = {"input": "#0072b2", "state": "#d55e00", "output": "#009e73", "weights": "#cc79a7", "context": "#e69f00"}
# Properties are set twice: renderers without CSS variables keep the first value.
_STYLE = """
svg.unrolled{--ink:#1f2328;--muted:#59636e;--rule:#d1d9e0;--paper:#fbf4f8;
--input:#0072b2;--state:#d55e00;--output:#009e73;--weights:#cc79a7;--context:#e69f00}
@media (prefers-color-scheme:dark){svg.unrolled{--ink:#e6edf3;--muted:#9da7b1;--rule:#3d444d;--paper:#2a2029;
--input:#56b4e9;--state:#e8762c;--output:#1fb88d;--weights:#cc79a7;--context:#e69f00}}
.unrolled text{fill:#1f2328;fill:var(--ink);
font-family:system-ui,-apple-system,"Segoe UI",Roboto,Helvetica,Arial,sans-serif}
.unrolled .muted{fill:#59636e;fill:var(--muted)}
.unrolled .strong{font-weight:600}
.unrolled .code{font-family:ui-monospace,SFMono-Regular,Menlo,Consolas,"DejaVu Sans Mono",monospace}
.unrolled .math{font-family:"STIX Two Text","Latin Modern Roman","Times New Roman",Georgia,serif;font-style:italic}
.unrolled .number{font-style:normal}
.unrolled .stroke{fill:none;stroke-width:1.75}
.unrolled .cell{fill:#fbf4f8;fill:var(--paper);stroke:#cc79a7;stroke:var(--weights);stroke-width:1.75}
.unrolled .dot{fill:#59636e;fill:var(--muted)}
.unrolled .stroke.rule{stroke:#d1d9e0;stroke:var(--rule);stroke-width:1}
.unrolled .stroke.plain{stroke:#59636e;stroke:var(--muted)}
.unrolled .head.plain{fill:#59636e;fill:var(--muted)}
""" + "".join(
    f".unrolled .stroke.{kind}{{stroke:{hue};stroke:var(--{kind})}}"
    f".unrolled .head.{kind},.unrolled .swatch.{kind}{{fill:{hue};fill:var(--{kind})}}\n"
    for kind, hue in _HUES.items()
)


def svg(*sketches: Sketch) -> str:
    """The picture as an SVG document: the figures of some networks, one below the other."""
    figures = list[list[Mark]]()
    for sketch in sketches:
        figure = Figure(sketch)
        figures.append([*figure.marks, *tables(sketch, figure.column)])
    bounds = [Bounds.around(marks) for marks in figures]
    tops = [0, *accumulate(math.ceil(bound.bottom + MARGIN) for bound in bounds)]
    width, height = math.ceil(max(bound.right for bound in bounds) + MARGIN), tops[-1]
    root = ET.Element("svg", {"xmlns": "http://www.w3.org/2000/svg", "class": "unrolled", "role": "img"})
    root.attrib |= {"viewBox": f"0 0 {width} {height}", "width": str(width), "height": str(height)}
    root.attrib |= {"aria-labelledby": "unrolled-title", "aria-describedby": "unrolled-description"}
    titles = (f"{printable(sketch.title)}, {sketch.dimensions}" for sketch in sketches)
    _add(root, "title", {"id": "unrolled-title"}, "; ".join(titles))
    _add(root, "desc", {"id": "unrolled-description"}, " ".join(map(_description, sketches)))
    _add(root, "style", {}, _STYLE)
    for top, marks in zip(tops, figures, strict=False):
        group = _add(root, "g", {"transform": f"translate(0 {top})"}, "\n") if top else root
        for mark in marks:
            _add_mark(group, mark)
    root.text = "\n"
    return ET.tostring(root, encoding="unicode") + "\n"


def _description(sketch: Sketch) -> str:
    """The picture in words, for those who cannot see it."""
    names = {
        kind: ", ".join(f"{printable(label.name)} {list(label.shape)}" for label in labels)
        for kind, labels in sketch.tensors.items()
    }
    tensors = "; ".join(f"{kind} {shortened(name, 400)}" for kind, name in names.items())
    first, last = sketch.time(0), sketch.time(sketch.T - 1)
    chain = f"copies {first} to {last} from left to right" if sketch.T > 1 else "copy 0"
    origin = f" The initial state is {sketch.initial_state}." if sketch.state else ""
    return (
        f"On the left the rolled cell, its state going round in a loop; on the right {chain}, each with its input "
        f"below, its output above and the state handed on to the next. {sketch.sharing.capitalize()}. "
        f"At every step: {tensors}.{origin}"
    )


def _add_mark(group: ET.Element, mark: Mark) -> None:
    if isinstance(mark, Label):
        _add_label(group, mark)
    elif isinstance(mark, Box):
        place = {"x": mark.x, "y": mark.y, "width": mark.width, "height": mark.height, "rx": mark.radius}
        _add(group, "rect", {"class": mark.style} | {name: f"{value:g}" for name, value in place.items()})
    else:
        _add(group, "path", {"class": f"stroke {mark.style}", "d": mark.path})
        if mark.head:
            _add(group, "path", {"class": f"head {mark.style}", "d": mark.head})


def _add_label(group: ET.Element, label: Label) -> None:
    attributes = {"x": f"{label.x:g}", "y": f"{label.y:g}", "font-size": f"{label.size:g}"}
    if label.anchor != "start":
        attributes["text-anchor"] = label.anchor
    text = _add(group, "text", attributes | ({"class": label.style} if label.style else {}), label.text)
    if label.full:
        text.text = None
        _add(text, "title", {}, label.full, tail=label.text)
    if label.subscript:
        lowered = {"dy": f"{0.22 * label.size:.3g}", "font-size": f"{label.subscript_size:.3g}"}
        lowered |= {"class": "number"} if label.subscript.isdecimal() else {}
        _add(text, "tspan", lowered, label.subscript, tail="")


def _add(
    parent: ET.Element, tag: str, attributes: dict[str, str], text: str | None = None, tail: str = "\n"
) -> ET.Element:
    element = ET.SubElement(parent, tag, attributes)
    element.text, element.tail = text, tail
    return element
