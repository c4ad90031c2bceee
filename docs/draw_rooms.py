"""Draws the rooms of the house, docs/rooms.svg, from the import contract: python docs/draw_rooms.py."""

from __future__ import annotations

import ast
import re
import textwrap
from html import escape
from pathlib import Path

import grimp

HERE = Path(__file__).parent
SOURCE = HERE.parent / "src" / "unrolled"

WIDTH, LANE = 860, 12  # of the boxes, and of each arrow that passes some of them by
HEIGHT, GAP, MARGIN = 54, 24, 16

STYLE = """
  svg { background: #fff; font-family: system-ui, sans-serif } rect { fill: #eef2f7; stroke: #7a8699 }
  .name { font-weight: 600; font-size: 13px; fill: #1b2430 } .what { font-size: 11px; fill: #44505f }
  path { fill: none; stroke: #7a8699; stroke-width: 1.2; marker-end: url(#tip) }
  marker path { fill: #7a8699; stroke: none }
  @media (prefers-color-scheme: dark) {
    svg { background: #14181d } rect { fill: #232a33 } .name { fill: #e8edf3 } .what { fill: #aeb9c6 }
  }
"""


def layers() -> list[list[str]]:
    """The layers of the contract, the top one first; those at the bottom know nothing of plans and engines."""
    contract = (HERE.parent / "pyproject.toml").read_text(encoding="utf-8").split("layers = [", 1)[1].split("]", 1)[0]
    return [re.findall(r"unrolled\.(\w+)", row) for row in re.findall(r'"([^"]+)"', contract)]


def imports() -> set[tuple[str, str]]:
    """Which room imports from which other, but for imports that the others imply."""
    graph = grimp.build_graph("unrolled", cache_dir=None)
    pairs = {
        (module.split(".")[1], found.split(".")[1])
        for module in graph.modules - {"unrolled"}
        for found in graph.find_modules_directly_imported_by(module) - {"unrolled"}
    }
    ahead = {room: {b for a, b in pairs if a == room != b} for pair in pairs for room in pair}

    def reached(room: str) -> set[str]:
        return ahead[room].union(*map(reached, ahead[room]))

    return {
        (a, b) for a, found in ahead.items() for b in found if not any(b in reached(other) for other in found - {b})
    }


def purpose(room: str) -> str:
    """The first sentence of a room's docstring."""
    file = next(path for path in (SOURCE / room / "__init__.py", SOURCE / f"{room}.py") if path.exists())
    text = " ".join((ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or "").split())
    return text.split(". ")[0].rstrip(".").replace("`", "")


def picture() -> str:
    """The rooms as SVG: a row for each layer, an arrow from each room to those that it imports from."""
    *rows, lowest = layers()
    ground = set(lowest)
    boxes, marks = dict[str, tuple[float, float, float]](), list[str]()
    for number, row in enumerate([*rows, ["ground"]]):
        width = (WIDTH - (len(row) - 1) * MARGIN) / len(row)
        for place, room in enumerate(row):
            x, y = MARGIN + place * (width + MARGIN), MARGIN + number * (HEIGHT + GAP)
            boxes[room] = x, y, width
            name, what = (
                (", ".join(lowest), "no knowledge of cells, plans or engines")
                if room == "ground"
                else (room, purpose(room))
            )
            marks.append(_box(x, y, width, name, what))
    found = {pair for pair in imports() if not ground & set(pair)}  # all rooms stand on the ground
    floor = {room: number for number, row in enumerate(rows) for room in row}
    far = sorted((floor[b] - floor[a], a, b) for a, b in found if floor[b] - floor[a] > 1)
    marks += [_near(boxes[a], boxes[b]) for a, b in sorted(found) if floor[b] - floor[a] == 1]
    marks += [_far(boxes[a], boxes[b], WIDTH + MARGIN + LANE * (n + 1)) for n, (_, a, b) in enumerate(far)]
    width = WIDTH + 2 * MARGIN + LANE * (len(far) + 1)
    height = (len(rows) + 1) * (HEIGHT + GAP) + MARGIN
    tip = '<marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}">',
            f'<style>{STYLE}</style><defs>{tip}<path d="M0 0L8 4L0 8z"/></marker></defs>',
            *marks,
            "</svg>\n",
        ]
    )


def _box(x: float, y: float, width: float, name: str, what: str) -> str:
    names = textwrap.wrap(name, int(width / 7))
    lines = textwrap.wrap(what, int(width / 5.8), max_lines=3 - len(names), placeholder=" ...")
    text = [("name", line) for line in names] + [("what", line) for line in lines]
    shown = (
        f'<text class="{kind}" x="{x + 8:.0f}" y="{y + 15 + 15 * n:.0f}">{escape(line)}</text>'
        for n, (kind, line) in enumerate(text)
    )
    return f'<rect x="{x:.0f}" y="{y:.0f}" width="{width:.0f}" height="{HEIGHT}" rx="4"/>' + "".join(shown)


def _near(above: tuple[float, float, float], below: tuple[float, float, float]) -> str:
    (x, y, width), (to, down, other) = above, below
    start, end = x + width / 2, to + other / 2
    return f'<path d="M{start:.0f} {y + HEIGHT:.0f}L{end:.0f} {down - 1:.0f}"/>'


def _far(above: tuple[float, float, float], below: tuple[float, float, float], lane: float) -> str:
    """Past the boxes in between, in a lane of its own at the right."""
    corners = [(above[0] + above[2], above[1] + HEIGHT - 8), (lane, 0.0), (below[0] + below[2], below[1] + 8)]
    (start, y), _, (end, down) = corners
    under = y + 8 + GAP / 3 if start < WIDTH else y
    over = down - 8 - GAP / 3 if end < WIDTH else down
    steps = [(start, y)] if start >= WIDTH else [(start - 20, y + 8), (start - 20, under)]
    steps += [(lane, under), (lane, over)]
    steps += [(end + 1, down)] if end >= WIDTH else [(end - 20, over), (end - 20, down - 9)]
    return '<path d="M' + "L".join(f"{x:.0f} {y:.0f}" for x, y in steps) + '"/>'


if __name__ == "__main__":
    (HERE / "rooms.svg").write_text(picture(), encoding="utf-8")
