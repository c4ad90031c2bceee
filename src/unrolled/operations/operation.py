"""What the passes over a step, and the engines that compile it, know of an operation: one record each, in one table.

To add an operation, declare it in the file of its family, under torch's name without namespace and overload:

- An element-wise one is a row of the table in `elementwise.py`: the C of one entry, and its cost. Torch's own tag says
  that it acts row by row.
- One that moves, adds up or multiplies entries is a method of a family (`views`, `joins`, `reductions`, `products`,
  `convolutions`, `indexing`, `ordering`) under the decorator `lowers`, with its `Operation`. The method writes the
  operation in nodes; `rows` names the rule by which time is folded into the batch.
- One that simpler operations compute has a `formula`, a function of tensors, or is `decomposed` by torch's own.
- One that no compiled loop does is a row in `uncompiled.py`, with its rule for the rows.
- Of integers it is a row in `integers.py`; of complex numbers a formula under the decorator `on_pairs` (`pairs.py`).
- A new family is a file that `__init__.py` imports, and a base of the class in `engine/native/lower.py`.

An operation that is in no table is run by torch: for all steps at once if it is tagged as pointwise, else step by step.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from enum import Enum, IntEnum
from typing import Any, TypeVar

import torch

from unrolled.operations.nodes import View
from unrolled.operations.row_rules import CouplesRowsError, Place, Rows
from unrolled.recording.program import Custom, Op


class Cost(IntEnum):
    """What an operation costs, against memory for its result. What a class may do, the classes below it may too."""

    REGISTER = 1
    """Less than to store the result for the next reader in the same loop: computed again for each."""

    LIGHT = 2
    """Less than memory for the results of all steps: the step backward computes it again."""

    FUSED = 3
    """Little: a compiled loop does it while the operands are at hand, though it could be done for all steps at once."""

    MATRIX = 4
    """A product with a matrix: likewise, if the matrix is small."""

    HEAVY = 5
    """So much that it is done for all steps at once wherever that can be."""


class Linear(Enum):
    """In what an operation is linear."""

    JOINTLY = "all operands together"
    EACH = "each operand, the others held"


@dataclass(frozen=True)
class Operation:
    """What is known of an operation.

    Attributes:
        rows: the rule for the rows of its results; None if there is none but torch's own tag for pointwise operations.
        alike: whether all rows are alike that it makes of operands without rows.
        cost: see `Cost`.
        linear: in what it is linear, None if in nothing: sums over the steps may be taken before it.
        fill: the position of a number that it writes besides, if it does: it is linear only where that is zero.
        contracts: of a product, the dimension of each operand over which it adds up; None for one that has none.
        factors: of a product, the positions of its factors among the arguments.
        moves: whether it does no arithmetic, only moves entries or repeats them.
        decomposed: whether a step backward is recorded with torch's formula of simpler operations in its place.
        formula: such a formula where it is not torch's: it takes what the operation takes, in torch's default overload,
            and may return NotImplemented.
        expression: of an element-wise operation, the C of one entry, with `{0}`, `{1}`, ... for the arguments.
        integers: likewise where all that it reads are integers; empty where it is not for them.
        keywords: keyword arguments that follow the positional ones in the expression, with their defaults.
        condition: which of its arguments is a bool that chooses, rather than a number.
        lower: writes it in nodes, where that takes more than the expression: `(lowering, op)` to the results' views.
    """

    rows: Callable[[Rows], list[Place]] | None = None
    alike: bool = False
    cost: Cost = Cost.HEAVY
    linear: Linear | None = None
    fill: int | None = None
    contracts: tuple[Place, ...] | None = None
    factors: tuple[int, int] | None = None
    moves: bool = False
    decomposed: bool = False
    formula: Callable[..., Any] | None = None
    expression: str = ""
    integers: str = ""
    keywords: tuple[tuple[str, Any], ...] = ()
    condition: int | None = None
    lower: Callable[[Any, Op], list[View]] | None = None

    @staticmethod
    def moving(rows: Callable[[Rows], list[Place]], *, alike: bool = False) -> Operation:
        """The record of an operation that shows or copies entries as they are: next to free, and linear."""
        return Operation(rows, alike, Cost.FUSED, Linear.JOINTLY, moves=True)


OPERATIONS: dict[str, Operation] = {}
"""All that are known, by torch's name without namespace and overload."""

_UNKNOWN = Operation()
_Rule = TypeVar("_Rule", bound=Callable[[Any, Op], list[View]])


def operation_of(op: Op) -> Operation:
    """What is known of an operation of a program; nothing of one that is in no table."""
    return _UNKNOWN if isinstance(op.target, Custom) else OPERATIONS.get(op.base, _UNKNOWN)


def declare(operations: Mapping[str, Operation]) -> None:
    """Add operations to the table.

    Raises:
        ValueError: if one is there already.
    """
    for name, operation in operations.items():
        if name in OPERATIONS:
            raise ValueError(f"the operation {name!r} is declared twice")
        OPERATIONS[name] = operation


def lowers(names: str, operation: Operation) -> Callable[[_Rule], _Rule]:
    """Declare operations, by names with spaces between, that a method of a family writes in nodes."""

    def decorate(rule: _Rule) -> _Rule:
        declare(dict.fromkeys(names.split(), replace(operation, lower=rule)))
        return rule

    return decorate


def rows_of_results(rows: Rows) -> list[Place]:
    """In which dimension an operation's results have their rows, by its rule.

    Raises:
        CouplesRowsError: if it is not proved to act row by row.
    """
    operation = operation_of(rows.op)
    if not any(v in rows.places for v in rows.op.inputs):
        return rows.created(alike=operation.alike or rows.op.draws)
    if operation.rows is not None:
        return operation.rows(rows)
    if torch.Tag.pointwise in getattr(rows.op.target, "tags", ()):
        return rows.pointwise()
    raise CouplesRowsError(f"{rows.op.name} is not known to act row by row")
