"""Batches of sequences that differ in length: which go together, and how they become one batch."""
