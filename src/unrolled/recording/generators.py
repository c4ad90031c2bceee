"""Generators that a step draws from by hand: where each is found at every call."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from torch import Generator, nn

from unrolled.recording.program import Draw, Program


@dataclass(frozen=True)
class GeneratorPlace:
    """Where in a cell a generator is found at every call.

    Attributes:
        module: the path of the module that holds it.
        keys: the attribute, and the keys in the containers there.
    """

    module: str
    keys: tuple[Any, ...]

    def fetch(self, cell: nn.Module) -> Generator:
        """The generator as it is now."""
        found: Any = vars(cell.get_submodule(self.module))
        for key in self.keys:
            found = found[key]
        generator: Generator = found
        return generator


def held_generators(cell: nn.Module) -> Iterator[tuple[GeneratorPlace, Generator]]:
    """The generators in the attributes of a cell's modules, and in lists, tuples and dicts there."""
    for module, holder in cell.named_modules():
        for keys, generator in _inside(vars(holder)):
            yield GeneratorPlace(module, keys), generator


def _inside(held: Any, depth: int = 0) -> Iterator[tuple[tuple[Any, ...], Generator]]:
    if isinstance(held, Generator):
        yield (), held
    elif isinstance(held, dict | list | tuple) and depth < 4 and len(held) <= 1024:
        for key, value in held.items() if isinstance(held, dict) else enumerate(held):
            yield from (((key, *keys), found) for keys, found in _inside(value, depth + 1))


def named(draw: Draw, cell: nn.Module) -> Draw:
    """A draw whose generator is named by its place in the cell; one from elsewhere stays the generator that it is."""
    places = [place for place, generator in held_generators(cell) if generator is draw.generator]
    return replace(draw, generator=places[0]) if places else draw


def bound(program: Program, cell: nn.Module) -> Program:
    """A program whose draws have the generators that now stand in a cell."""
    if not any(isinstance(generator, GeneratorPlace) for generator in program.generators):
        return program
    return replace(program, ops=tuple(replace(op, target=_bound(op.target, cell)) for op in program.ops))


def _bound(target: Any, cell: nn.Module) -> Any:
    if isinstance(target, Draw) and isinstance(target.generator, GeneratorPlace):
        return replace(target, generator=target.generator.fetch(cell))
    return target
