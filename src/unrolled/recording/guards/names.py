"""The names that a piece of Python code looks up or binds: what it can reach, seen from its instructions."""

from __future__ import annotations

import dis
import types
from functools import lru_cache
from typing import NamedTuple

from torch import nn


class Names(NamedTuple):
    """Of one code object, with those of the functions that are written inside of it.

    Attributes:
        globals: looked up among the globals of its module, and the builtins.
        attributes: looked up in objects, classes and modules.
        modules: imported while it runs.
        computed: whether it also looks up names that it makes as it runs.
    """

    globals: frozenset[str]
    attributes: frozenset[str]
    modules: frozenset[str]
    computed: bool


# What modules look up is named by the code that asks them.
_LOOKUPS = (nn.Module.__getattr__.__code__, nn.Module.__setattr__.__code__, nn.Module.__delattr__.__code__)


@lru_cache(maxsize=8192)
def names_in(code: types.CodeType) -> Names:
    """The names in a code object.

    Example:
        >>> def scaled(x):
        ...     return SETTINGS.rnn.gain * x
        >>> found = names_in(scaled.__code__)
        >>> sorted(found.globals), sorted(found.attributes), found.computed
        (['SETTINGS'], ['gain', 'rnn'], False)
    """
    globals_, attributes, modules = set[str](), set[str](), set[str]()
    computing = (
        set()
        if code in _LOOKUPS
        else {"getattr", "setattr", "delattr", "hasattr", "vars", "dir", "__dict__", "attrgetter"}
    )
    matches = False
    for instruction in dis.get_instructions(code):
        matches = matches or instruction.opname == "MATCH_CLASS"
        if instruction.opcode not in dis.hasname or not isinstance(instruction.argval, str):
            continue
        kind = instruction.opname
        if kind == "IMPORT_NAME":
            modules.add(instruction.argval)
        elif "GLOBAL" in kind or kind.endswith("_NAME"):
            globals_.add(instruction.argval)
        else:
            attributes.add(instruction.argval)
    inner = [names_in(constant) for constant in code.co_consts if isinstance(constant, types.CodeType)]
    found = Names(
        frozenset(globals_.union(*(names.globals for names in inner))),
        frozenset(attributes.union(*(names.attributes for names in inner))),
        frozenset(modules.union(*(names.modules for names in inner))),
        any(names.computed for names in inner) or not computing.isdisjoint(globals_ | attributes),
    )
    return found._replace(attributes=found.attributes | _spelled(code)) if found.computed or matches else found


def _spelled(code: types.CodeType) -> frozenset[str]:
    """Strings in the code that may be names: of `getattr(settings, "gain")`, say."""
    flat = [part for constant in code.co_consts for part in (constant if isinstance(constant, tuple) else (constant,))]
    return frozenset(part for part in flat if isinstance(part, str) and part.isidentifier())
