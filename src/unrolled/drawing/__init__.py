"""Pictures of unrolled networks: a sketch says what is to be drawn, a renderer for each format draws it."""

from unrolled.drawing.sketch import Leaf, Parameter, Sketch

__all__ = ["Leaf", "Parameter", "Sketch"]
