"""Random cells: every engine gives the reference's values and gradients. `make fuzz` runs more of them."""

from __future__ import annotations

import os

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings

from random_cells import OPERATIONS, RandomCell, Recipe, assert_as_reference, decision, recipes

MANY = int(os.environ.get("UNROLLED_FUZZ", "0"))
"""How many cells for each engine, where more than in CI are asked for."""


def _fuzzed(many: int) -> settings:
    return settings(
        max_examples=MANY or many,
        deadline=None,
        database=None,
        derandomize=not MANY,
        suppress_health_check=list(HealthCheck),
        phases=(Phase.generate, Phase.shrink) if MANY else (Phase.generate,),
    )


def _run(recipe: Recipe, engine: str) -> None:
    torch.manual_seed(recipe.seed)
    x = torch.randn(recipe.steps, recipe.batch, recipe.size, dtype=torch.float64)
    cell = RandomCell(recipe)
    assert decision(cell, x, engine).plan is not None, decision(cell, x, engine).why
    assert_as_reference(cell, x, engine=engine, what=str(recipe))


@_fuzzed(200)
@given(recipes())
def test_random_cells_on_the_eager_engine(recipe):
    _run(recipe, "eager")


@_fuzzed(12)
@given(recipes())
def test_random_cells_on_the_native_engine(recipe):
    _run(recipe, "native")


@pytest.mark.parametrize("engine", ["eager", "native"])
def test_all_operations_in_one_cell(engine):
    """Each operation reads the state and what the one before it made."""
    names = sorted(OPERATIONS)
    for part in range(0, len(names), 10):
        lines = tuple((name, 0, n + 1) for n, name in enumerate(names[part : part + 10]))
        _run(Recipe(5, 2, lines, (0, 4), 2, 4, 3, part), engine)
