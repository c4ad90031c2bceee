"""Operations that no compiled loop does: the rules for their rows, by which torch does them for all steps at once."""

from __future__ import annotations

from unrolled.operations.operation import Operation, declare
from unrolled.operations.row_rules import Rows, along

_ALONG_SOME = "nansum mode"

declare(
    {
        **dict.fromkeys(("copy", "fill", "empty_like"), Operation(Rows.first)),
        **dict.fromkeys(("empty", "new_empty"), Operation(alike=True)),
        "chunk": Operation(along(2, default=0)),
        **dict.fromkeys(_ALONG_SOME.split(), Operation(along(1, 2))),
        "embedding_dense_backward": Operation(contracts=(0, 0)),
        "complex": Operation(Rows.pointwise),
        **dict.fromkeys(("poisson", "binomial", "_standard_gamma"), Operation(Rows.pointwise)),
        **dict.fromkeys(("multinomial", "_sample_dirichlet"), Operation(along(-1, default=-1))),
        **dict.fromkeys(("_fft_r2c", "_fft_c2r", "_fft_c2c"), Operation(along(1))),
        "diagonal_scatter": Operation(Rows.diagonal_scatter),
    }
)
