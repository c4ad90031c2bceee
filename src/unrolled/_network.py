"""What the copies of one unrolled network share: the weights, the doors, and whether there are gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from torch import Tensor, nn

from unrolled._doors import Listener, Passage, pass_through
from unrolled.cells.adapted import parameter_names
from unrolled.errors import GradientError
from unrolled.trees import Tree

__all__ = ["Network", "Shares"]


class Network:
    """What all the copies of one unrolled network share."""

    def __init__(self, cell: nn.Module, state: Tree, context: Tree, *, own_state: bool) -> None:
        self.cell = cell
        parameters = dict(cell.named_parameters())
        self.paths = {name: path for name, path in parameter_names(cell).items() if parameters[path].requires_grad}
        self.weights = {name: parameters[path] for name, path in self.paths.items()}
        self.own_state = own_state
        self.listener = Listener()
        self.backwards = 0
        self.norms: dict[int, dict[str, Tensor]] = {}
        self.remembered: list[list[Tensor | None]] = []
        (self.initial,) = self.through_door(state)
        self.context = None if context is None else self.through_door(context)[0]

    def remember(self, backward: Callable[[], None]) -> None:
        """Run a backward pass and remember what flows; if it fails, what was remembered before stays."""
        before = [(grads, list(grads)) for grads in self.remembered]
        self.listener.listening = True
        try:
            backward()
        except BaseException as error:
            for grads, kept in before:
                grads[:] = kept
            if not isinstance(error, RuntimeError):
                raise
            raise GradientError(
                "the backward pass failed; the copies' gradients are as before, .grad is as far as torch came. "
                f"If the weights have changed since the run, run copies again. torch says: {error}"
            ) from error
        finally:
            self.listener.listening = False
        self.norms.clear()
        self.backwards += 1

    def through_door(self, *trees: Tree) -> list[Passage]:
        """Lead trees through one door."""
        passages = [Passage(tree) for tree in trees]
        pass_through(self.listener, *passages)
        self.remembered += [passage.grads for passage in passages]
        return passages

    def require_backward(self) -> None:
        if not self.backwards:
            raise GradientError("the copies have no gradients yet; call copies.backward(loss) first")


class Shares(Mapping[str, Tensor]):
    """Parameter names to tensors that are computed when asked for."""

    def __init__(self, network: Network, title: str, compute: Callable[[str], Tensor]) -> None:
        network.require_backward()
        self._names, self._title, self._compute = tuple(network.weights), title, compute

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._names:
            known = ", ".join(self._names) or "none"
            raise KeyError(f"{name!r} is not a trained parameter of the cell; these are: {known}")
        return self._compute(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def __repr__(self) -> str:
        return f"{self._title}: {', '.join(self._names)}"
