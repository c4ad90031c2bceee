"""Measurements of an unrolled network: they return data and draw nothing."""
