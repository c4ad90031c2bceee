"""What the parts of a network are called: 'layer 1, backwards'."""

from __future__ import annotations

from collections.abc import Iterator

from unrolled.introspection.copies import Copies
from unrolled.introspection.layered import DirectedCopies, LayeredCopies


def networks_in(run: Copies | LayeredCopies, place: str = "") -> Iterator[tuple[str, Copies]]:
    """The copies of each network by its name (empty for a network of one cell), in the order in which they ran."""
    if isinstance(run, Copies):
        yield place, run
        return
    for number, part in enumerate(run):
        name = ("forwards", "backwards")[number] if isinstance(run, DirectedCopies) else f"layer {number}"
        yield from networks_in(part, ", ".join(filter(None, [place, name])))
