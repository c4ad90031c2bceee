"""The cell contract, kept: states that fit, and steps that return what they must."""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from unrolled.autograd_graph import differentiable
from unrolled.cells.adapted import check_state_maker, context_use
from unrolled.cells.base import StandInCell
from unrolled.errors import CellError, InputError, StateError, UnrolledError
from unrolled.internals import tensors_in
from unrolled.lengths import Extent
from unrolled.trees import Structure, Tree, describe, flatten, leaves, map_leaves, named_leaves, paths
from unrolled.unseen import OwnDraws


def name_of(cell: nn.Module) -> str:
    """What a person would call a cell: its class, or that of what it was made of."""
    return cell.display_name if isinstance(cell, StandInCell) else type(cell).__name__


def state_names(cell: nn.Module) -> Sequence[str]:
    """What a cell calls the tensors of its state; nothing where it does not say."""
    names = getattr(cell, "state_names", ())
    return names if isinstance(names, tuple | list) and all(isinstance(name, str) for name in names) else ()


def refuse_without_rows(cell: nn.Module, state: Tree, batch: int, what: str) -> None:
    """Refuse a state with leaves that do not have a row for each sequence, where rows go ways of their own.

    Args:
        cell: the cell.
        state: its state.
        batch: B.
        what: the argument that needs rows: 'lengths' or 'resets'.

    Raises:
        InputError: naming the leaf.
    """
    for name, leaf in named_leaves(state, "state"):
        if leaf.dim() == 0 or leaf.shape[0] != batch:
            raise InputError(
                f"{what} need a state whose leaves have a row for each sequence, [B, ...] with B = {batch}; "
                f"{name} of {name_of(cell)} is {describe(leaf)}; leave {what}= out, or give it rows"
            )


def starting_state(cell: nn.Module, state: Tree, inputs: Tree, batch_size: int) -> Tree:
    """The state that first copies receive: the one that was passed, checked, or for None the cell's own.

    Raises:
        StateError: as `check_state` and `make_state` do.
    """
    if state is None:
        return make_state(cell, inputs, batch_size)
    check_state(cell, state, inputs, batch_size)
    return state


def make_state(cell: nn.Module, inputs: Tree, batch_size: int) -> Tree:
    """The cell's own initial state for these inputs: on their device, in the dtype of its parameters.

    Raises:
        StateError: if the cell cannot make one, or makes one that is no pytree of tensors.
    """
    tensors = leaves(inputs)
    try:
        state = cell.initial_state(batch_size, device=tensors[0].device, dtype=floating_dtype(cell, tensors))
    except UnrolledError:
        raise
    except Exception as error:
        check_state_maker(cell.initial_state, name_of(cell))
        raise StateError(f"{name_of(cell)}.initial_state raised {type(error).__name__}: {error}") from error
    try:
        leaves(state)
    except TypeError as error:
        raise StateError(f"{name_of(cell)}.initial_state must return a pytree of tensors: {error}") from error
    return state


def floating_dtype(cell: nn.Module, inputs: list[Tensor]) -> torch.dtype:
    """The dtype in which a cell makes its state: that of its parameters, else that of the inputs.

    It is complex where any of the parameters is: others, a phase say, may well be real.
    """
    for tensors in (tensors_in(cell, "_parameters"), inputs):
        dtypes = [x.dtype for x in tensors if differentiable(x)]
        if dtypes:
            return next((dtype for dtype in dtypes if dtype.is_complex), dtypes[0])
    return torch.get_default_dtype()


def check_state(cell: nn.Module, state: Tree, inputs: Tree, batch_size: int) -> None:
    """Refuse a state that is not what this cell starts from with these inputs.

    It must have the structure, shapes, dtypes and device of the state that the cell makes itself; of a cell that makes
    none it must have B rows, on the device of the inputs.

    Raises:
        StateError: naming the leaf, what it is and what it should be.
    """
    try:
        found, structure = named_leaves(state, "state"), flatten(state)[1]
    except TypeError as error:
        raise StateError(f"a state must be a pytree of tensors: {error}; use torch.as_tensor") from error
    try:
        with torch.no_grad(), OwnDraws():  # asking only for comparison must not use up random numbers
            tensors, wanted = flatten(make_state(cell, inputs, batch_size))
    except StateError:
        _check_rows(found, batch_size, leaves(inputs)[0].device)
        return
    if structure != wanted:
        raise StateError(
            f"a state of {name_of(cell)} looks like {_outline(wanted)}, got {_outline(structure)}; "
            "pass what the cell's initial_state or an earlier call returned"
        )
    for (name, got), want in zip(found, tensors, strict=True):
        if not _fits(got, want) and not _fits(got, want.to(floating_dtype(cell, []))):
            raise StateError(
                f"{name} must be {describe(want)} on {want.device} for a batch of {batch_size}, "
                f"got {describe(got)} on {got.device}; pass on the state of a call with the same batch, or convert it"
            )


def _check_rows(state: list[tuple[str, Tensor]], batch_size: int, device: torch.device) -> None:
    for name, leaf in state:
        if leaf.dim() and leaf.shape[0] != batch_size:
            raise StateError(
                f"{name} must be [B, ...] with B = {batch_size}, as the inputs are, got {list(leaf.shape)}; "
                "pass a state made for this batch"
            )
        if leaf.device != device:
            raise StateError(f"{name} is on {leaf.device}, the inputs on {device}; move one to the other")


def _outline(structure: Structure) -> str:
    """A structure without sizes, as a person would write it."""
    if structure.kind is Tensor:
        return "tensor"
    inside = ", ".join(
        kinds if isinstance(key, int) else f"{key}={kinds}"
        for key, kinds in zip(structure.keys, map(_outline, structure.children), strict=True)
    )
    return "None" if structure.kind is type(None) else f"{structure.kind.__name__}({inside})"


def _fits(got: Tensor, want: Tensor) -> bool:
    """Same shape, device and dtype; under autocast, which changes dtypes between steps, any floating dtype."""
    same = got.shape == want.shape and got.device == want.device
    if got.dtype == want.dtype:
        return same
    both_floating = got.is_floating_point() and want.is_floating_point()
    return same and both_floating and torch.is_autocast_enabled(got.device.type)


def check_context(cell: nn.Module, context: Tree, batch_size: int) -> None:
    """Refuse a context for a cell that takes none, none for a cell that needs one, and one of another batch.

    Raises:
        InputError: saying which.
    """
    use = context_use(cell)
    if context is None and use == "requires":
        raise InputError(f"{name_of(cell)} takes a third argument, its context; pass context= to the call")
    if context is not None and use == "refuses":
        raise InputError(f"{name_of(cell)} takes (input, state) and no context; leave context= out")
    try:
        found = named_leaves(context, "context")
    except TypeError as error:
        raise InputError(f"a context must be a pytree of tensors: {error}; use torch.as_tensor") from error
    for name, leaf in found:
        if leaf.dim() == 0 or leaf.shape[0] != batch_size:
            raise InputError(
                f"{name} must be [B, ...] with B = {batch_size}, as the inputs are, got {list(leaf.shape)}; "
                "expand it to the batch, or keep what has no batch in the cell"
            )


def _versions(tensors: list[Tensor]) -> list[int]:
    """How often each tensor was written to; tensors of inference mode do not count."""
    return [tensor._version for tensor in tensors if not tensor.is_inference()]


class CheckedStep:
    """A cell's step that is called with t and checks what comes back, copy by copy.

    Args:
        cell: the cell.
        context: what a cell with a third argument attends to, or None.
        extent: how far its copies reach; None where all of them have the context's rows.
        start: the first copy's t.
    """

    def __init__(self, cell: nn.Module, context: Tree = None, extent: Extent | None = None, start: int = 0) -> None:
        self.cell = cell
        self._context, self._extent, self._start = context, extent, start

    def rest(self, t: int) -> tuple[Tree, ...]:
        """What copy t receives after input and state: the rows of the context that are alive, if there is one."""
        if self._context is None:
            return ()
        if self._extent is None or not self._extent.ragged:
            return (self._context,)
        alive = self._extent.sizes[t - self._start]
        return (map_leaves(lambda leaf: leaf[:alive], self._context),)

    def __call__(self, t: int, input: Tree, state: Tree) -> tuple[Tree, Tree]:
        """Run copy t.

        Raises:
            InputError: if it fails on integers that it computes with.
            CellError: if the cell raises, returns something else than (output, state), or changes its state's
                structure, shape, dtype or device.
        """
        tensors, structure = flatten((input, state))
        versions = _versions(tensors)
        try:
            returned = self.run(t, input, state)
        except UnrolledError:
            raise
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            if type(error).__module__ == "torch.utils.checkpoint":  # how it stops a run that it makes again
                raise
            raise self._explained(t, input, state, error) from error
        output, following = self._pair(t, returned)
        self._check_leaves(t, "output", output)
        if versions != _versions(tensors):
            raise self._written_into(t)
        new, kind = self._check_leaves(t, "state", following)
        old = tensors[len(tensors) - len(new) :]
        if kind != structure.children[1] or not all(map(_fits, new, old)):
            raise self._changed(t, state, following)
        return output, following

    def run(self, t: int, input: Tree, state: Tree) -> tuple[Tree, Tree]:
        """Call the cell, unchecked."""
        return self.cell(input, state, *self.rest(t))

    def _explained(self, t: int, input: Tree, state: Tree, error: Exception) -> UnrolledError:
        what = (
            f"copy {t} of {name_of(self.cell)} raised {type(error).__name__}: {str(error).rstrip('. ')}. "
            f"It received input {describe(input)} and state {describe(state)}"
        )
        integers = any(not differentiable(leaf) for leaf in leaves(input))
        if integers and re.search(r"dtype|Long|Int|Bool|Byte|Char|Short", str(error)):
            return InputError(
                f"{what}. A cell that computes with its inputs needs floats: inputs.float(), or embed them"
            )
        if isinstance(error, RuntimeError) and "dtype" in str(error):
            return InputError(f"{what}. Inputs, state and weights must have one dtype: convert the inputs or the cell")
        return CellError(f"{what}. Run cell(input, state) on its own with these shapes to find the line")

    def _pair(self, t: int, returned: Tree) -> tuple[Tree, Tree]:
        if not isinstance(returned, tuple) or len(returned) != 2:
            got = f"a {type(returned).__name__}" + (f" of {len(returned)}" if isinstance(returned, tuple) else "")
            raise CellError(
                f"a cell must return (output, state), but copy {t} of {name_of(self.cell)} returned {got}; "
                "wrap it: as_cell(module, step=(module, input, state) -> (output, state))"
            )
        return returned[0], returned[1]

    def _written_into(self, t: int) -> CellError:
        return CellError(
            f"copy {t} of {name_of(self.cell)} wrote into its input or state in place, which changes what the "
            "caller and the other copies hold; compute it out of place (state = state + x, not state += x)"
        )

    def _changed(self, t: int, before: Tree, after: Tree) -> CellError:
        old, new = flatten(before), flatten(after)
        grown = _grown(old, new)
        if grown:
            return CellError(f"a state has one size for all copies, but in copy {t} of {name_of(self.cell)} {grown}")
        devices = [", ".join(dict.fromkeys(str(leaf.device) for leaf in tensors)) for tensors, _ in (old, new)]
        moved = old[1] == new[1] and devices[0] != devices[1]
        old_devices, new_devices = (f" on {device}" if moved else "" for device in devices)
        return CellError(
            f"a cell must hand on a state like the one it received, but copy {t} of {name_of(self.cell)} received "
            f"{_outline(old[1])} {describe(before)}{old_devices} and returned "
            f"{_outline(new[1])} {describe(after)}{new_devices}; "
            + ("make the initial state with the batch size and dtype that are asked for" if t == 0 else "keep it alike")
        )

    def _check_leaves(self, t: int, what: str, tree: Tree) -> tuple[list[Tensor], Structure]:
        try:
            return flatten(tree)
        except TypeError as error:
            raise CellError(
                f"the {what} that copy {t} of {name_of(self.cell)} returned must be a pytree of tensors: {error}"
            ) from error


def _grown(old: tuple[list[Tensor], Structure], new: tuple[list[Tensor], Structure]) -> str:
    """Which leaf of a state has become longer, and how it is written with one length; empty if none has."""
    if old[1] != new[1]:
        return ""
    for path, before, after in zip(paths(old[1], "state"), old[0], new[0], strict=True):
        longer = [d for d, (m, n) in enumerate(zip(before.shape, after.shape, strict=False)) if m != n]
        if before.dim() != after.dim() or len(longer) != 1 or longer == [0] or after.numel() < before.numel():
            continue
        (dim,) = longer
        more = after.shape[dim] - before.shape[dim]
        newest = f"[{':, ' * dim}{more}:]"
        return (
            f"{path} grew from {list(before.shape)} to {list(after.shape)}. Begin with N entries of zeros, as many as "
            f"are ever looked at, let the oldest go, and count what is there in a state [B] of its own:\n"
            f"    cache, count = torch.cat([cache{newest}, new], {dim}), count + {more}\n"
            "    seen = torch.arange(N) >= N - count.unsqueeze(1)  # [B, N], the mask of what is read"
        )
    return ""
