"""Pictures of unrolled networks.

In come a network and its inputs. One step gives a `Sketch`, a whole run with its diagnosis gives a `Portrait`: both are
plain data without tensors. Renderers, one for each format, make files of these and measure nothing.
"""
