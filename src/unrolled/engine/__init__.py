"""Engines: ways to run an unrolled network, all with the reference's answers."""

from unrolled.engine import reference

__all__ = ["reference"]
