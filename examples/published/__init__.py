"""Published recurrent cells, written as their users write them: what runs compiled, and how fast.

`CELLS` names them all, each an `Example` that makes a cell and inputs for it. The tests hold every one against its own
loop, and `python -m benchmarks published` times it against that loop.
"""

from __future__ import annotations

from examples.published import chance, fields, gated, memories, neurons, spaces
from examples.published.example import Example, Sizes, loop

__all__ = ["CELLS", "Example", "Sizes", "loop"]

CELLS: dict[str, Example] = {
    **gated.CELLS,
    **spaces.CELLS,
    **memories.CELLS,
    **chance.CELLS,
    **neurons.CELLS,
    **fields.CELLS,
}
