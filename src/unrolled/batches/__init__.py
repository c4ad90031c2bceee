"""Batches of sequences that differ in length.

In come samples: a sampler says which go together, collate functions make one batch of them, padded or packed. Out of
a network's outputs for such a batch come the last ones, a pool or a loss, in which padding takes no part.
"""
