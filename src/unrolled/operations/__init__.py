"""What is known of each of torch's operations: a table with one record for each, in families.

A record says where the rows of a result are, what the operation costs, in what it is linear, whether it is made of
simpler ones, and how it is written in nodes (computations on the entries of one row of the batch). In comes an
operation of a recorded program; out go the facts by which the passes of `plan` decide, and the nodes that a compiling
engine emits. See `operation.py` for how to add one.
"""

from unrolled.operations import (
    attention,
    bilinear,
    decomposed,
    diagonals,
    distances,
    elementwise,
    indexing,
    integers,
    joins,
    linalg,
    losses,
    maxima,
    ordering,
    pair_functions,
    pair_transforms,
    pairs,
    products,
    quantization,
    reductions,
    resampling,
    spatial,
    special,
    uncompiled,
    vectors,
    views,
    windows,
)

__all__ = [
    "attention",
    "bilinear",
    "decomposed",
    "diagonals",
    "distances",
    "elementwise",
    "indexing",
    "integers",
    "joins",
    "linalg",
    "losses",
    "maxima",
    "ordering",
    "pair_functions",
    "pair_transforms",
    "pairs",
    "products",
    "quantization",
    "reductions",
    "resampling",
    "spatial",
    "special",
    "uncompiled",
    "vectors",
    "views",
    "windows",
]
