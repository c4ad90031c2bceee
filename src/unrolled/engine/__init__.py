"""Engines: ways to run an unrolled network, all with the reference's answers.

In comes a cell with its inputs over a segment; out go its outputs and last state. The plan cache decides how a call is
run, and keeps what it decided: by the reference, which is a loop over the cell; or by a plan, whose loops run natively
(emitted as C) or eagerly (torch operations). A witness holds plans against the cell itself.
"""

from unrolled.engine import reference

__all__ = ["reference"]
