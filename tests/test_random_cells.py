"""Random cells: every engine gives the reference's values and gradients. `make fuzz` runs more of them."""

from __future__ import annotations

import os
from functools import cache

import pytest
from hypothesis import HealthCheck, Phase, given, settings

from random_cells import (
    OPERATIONS,
    Recipe,
    assert_recipe_as_reference,
    failures_on_the_native_engine,
    recipes,
)

FUZZED = int(os.environ.get("UNROLLED_FUZZ", "0"))
"""How many cells for each engine, where more than in CI are asked for."""

MANY = FUZZED or 200
TOGETHER = 25
"""How many cells' loops are built as one library: a run of the compiler for each cell would take most of the time."""


def _settings(*phases: Phase) -> settings:
    return settings(
        max_examples=MANY,
        deadline=None,
        database=None,
        derandomize=not FUZZED,
        suppress_health_check=list(HealthCheck),
        phases=phases,
    )


@_settings(Phase.generate, *([Phase.shrink] if FUZZED else []))
@given(recipes())
def test_random_cells_on_the_eager_engine(recipe):
    assert_recipe_as_reference(recipe, "eager")


@cache
def _drawn() -> list[Recipe]:
    found: list[Recipe] = []

    @_settings(Phase.generate)
    @given(recipes())
    def draw(recipe: Recipe) -> None:
        found.append(recipe)

    draw()
    return found


@pytest.mark.parametrize("start", range(0, MANY, TOGETHER))
def test_random_cells_on_the_native_engine(start):
    some = _drawn()[start : start + TOGETHER]
    assert some
    failures = failures_on_the_native_engine(some)
    assert not failures, "\n".join(failures)


@pytest.mark.parametrize("engine", ["eager", "native"])
def test_all_operations_in_one_cell(engine):
    """Each operation reads the state and what the one before it made."""
    names = sorted(OPERATIONS)
    for part in range(0, len(names), 10):
        lines = tuple((name, 0, n + 1) for n, name in enumerate(names[part : part + 10]))
        assert_recipe_as_reference(Recipe(5, 2, lines, (0, 4), 2, 4, 3, part), engine)


FOUND = {
    "a next state that has no gradient, of a state that an output has one of": Recipe(
        1, 1, (("add", 1, 0), ("masked", 2, 0)), kept=(0,), shown=1, steps=3, batch=2, seed=0, asked=False
    ),
    "an output that reads what a loop made, and the same a step later": Recipe(
        1, 2, (("add", 0, 0), ("add", 0, 2)), kept=(1, 1), shown=0, steps=3, batch=2, seed=0
    ),
    "a view of what lay in memory in another way when it was recorded": Recipe(
        2, 3, (("add", 2, 2), ("heads", 0, 4)), kept=(1, 5, 0), shown=5, steps=1, batch=1, seed=0
    ),
}
"""Cells that failed once."""


@pytest.mark.parametrize("engine", ["eager", "native"])
@pytest.mark.parametrize("recipe", FOUND.values(), ids=FOUND)
def test_what_was_found(recipe, engine):
    assert_recipe_as_reference(recipe, engine)
