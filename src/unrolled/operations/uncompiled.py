"""Operations that no compiled loop does: the rules for their rows, by which torch does them for all steps at once."""

from __future__ import annotations

from unrolled.operations.operation import Operation, declare
from unrolled.operations.row_rules import Rows, along

_ALONG_SOME = "min argmax argmin median nansum count_nonzero"
_ALONG_ONE = "cumprod cummax logcumsumexp sort"

declare(
    {
        **dict.fromkeys(("copy", "fill", "empty_like"), Operation(Rows.first)),
        **dict.fromkeys(("empty", "new_empty"), Operation(alike=True)),
        "embedding": Operation(Rows.embedding),
        "gather": Operation(Rows.gather),
        "index_select": Operation(Rows.index_select),
        "chunk": Operation(along(2, default=0)),
        **dict.fromkeys(_ALONG_SOME.split(), Operation(along(1, 2))),
        **dict.fromkeys(_ALONG_ONE.split(), Operation(along(1, default=-1))),
        "topk": Operation(along(2, default=-1)),
        "complex": Operation(Rows.pointwise),
    }
)
