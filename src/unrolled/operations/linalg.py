"""Linear algebra with a matrix for each row: solving, factoring, inverting. torch does it, matrix by matrix."""

from __future__ import annotations

from unrolled.operations.operation import Operation, declare
from unrolled.operations.row_rules import Place, Rows
from unrolled.recording.program import Size

_OF_MATRICES = """
_linalg_solve_ex linalg_lu_solve linalg_lu_factor_ex linalg_lu linalg_solve_triangular triangular_solve cholesky
cholesky_solve cholesky_inverse linalg_cholesky_ex linalg_inv_ex _linalg_det _linalg_slogdet linalg_matrix_exp
linalg_qr linalg_householder_product _linalg_eigh _linalg_svd linalg_eig linalg_pinv linalg_ldl_factor_ex lu_unpack
"""


def _matrices(rows: Rows) -> list[Place]:
    """A matrix, or a vector beside a matrix, for each row: the rows count the matrices, and are in front."""
    read = [(rows.places[v], len(rows.program.values[v].shape)) for v in rows.op.inputs if v in rows.places]
    if any(place != 0 for place, _ in read) or max(rank for _, rank in read) < 3:
        raise rows.refusal("works along the rows")
    shapes = [rows.program.values[v].shape if v >= 0 else () for v in rows.op.outputs]
    return [0 if shape and shape[0] == Size(1, 0) else None for shape in shapes]


declare(dict.fromkeys(_OF_MATRICES.split(), Operation(_matrices)))
