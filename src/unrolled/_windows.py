"""Windows: truncated BPTT over a sequence that is longer than memory."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, Protocol

import torch
from torch import Tensor

from unrolled import sequence
from unrolled._chunks import Chunks
from unrolled._given import Given, Lengths, given_as
from unrolled.bptt.truncated import Tape, left_behind
from unrolled.bptt.truncation import Block, Truncation
from unrolled.errors import GradientError, InputError, OptionError, StateError, UnrolledError
from unrolled.lengths import Extent, checked_lengths
from unrolled.trees import Tree, flatten, map_leaves, paths

__all__ = ["Window", "each_window"]


class Network(Protocol):
    """What windows are run on."""

    batch_first: bool

    def through(
        self, given: Given, steps: Tree, state: Tree, resets: Tensor | None, context: Tree
    ) -> tuple[Tree, Tree]:
        """Run over sequences that are laid out as engines take them."""

    def _get_name(self) -> str: ...


class Window:
    """Some new steps of a long sequence, and the way back through a horizon of copies; made by `windows`.

    Attributes:
        inputs: of the new steps, `[n, B, ...]` (`[B, n, ...]` with `batch_first`), n = stride or fewer at the end.
        outputs: of the new steps.
        state: what the last copy handed on; no gradient flows back from it.
        start: the first new step, counted from the beginning of the source.
        stop: one past the last new step.
    """

    def __init__(self, inputs: Tree, outputs: Tree, state: Tree, start: int, stop: int, tape: Tape) -> None:
        self.inputs, self.outputs, self.state = inputs, outputs, state
        self.start, self.stop = start, stop
        self._standing = tape.standing
        self._walked = False

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of this window's loss to `.grad`, once; nothing is added if it is refused.

        Args:
            loss: a scalar made of this window's outputs.

        Raises:
            GradientError: if it was called before, or if the loss needs outputs of a window that has been left.
        """
        left = self._standing.left or left_behind(loss)
        if left is not None:
            raise GradientError(left)
        if self._walked:
            raise GradientError(
                f"the window of {_steps(self)} has had its backward pass; add up its losses and call backward once"
            )
        if not loss.requires_grad:
            raise GradientError(
                f"the loss of {_steps(self)} leads back to no parameter; make it of window.outputs, without "
                "detach() or no_grad()"
            )
        self._walked = True
        loss.backward()

    def leave(self) -> None:
        """Give up what a backward pass would need: the next window begins."""
        self._standing.leave(
            f"the loss needs outputs of {_steps(self)}, a window that was left when the next one began; take each "
            "window's loss while it lasts: window.backward(loss), and detach() what you keep of it"
        )

    def __repr__(self) -> str:
        return f"Window({_steps(self)})"


def _steps(window: Window) -> str:
    return f"steps {window.start} to {window.stop - 1}"


def each_window(
    network: Network,
    truncation: Truncation | None,
    source: Iterable[Tree],
    state: Tree,
    *,
    lengths: Lengths,
    resets: Iterable[Tensor] | None,
    context: Tree,
) -> Iterator[Window]:
    """The windows of a source; see `Unrolled.windows`. What is refused beforehand is refused now, not by `next`."""
    if truncation is None:
        raise OptionError(
            f"windows need a horizon, {network._get_name()} has none; make it with unroll(cell, horizon=k2, stride=k1)"
        )
    if getattr(network, "reverse", False):
        raise InputError(
            "a reversed network begins at the end, which a source has not reached yet; run windows forwards, or the "
            "whole sequence in one call"
        )
    _refuse_graphs("state", state, StateError)
    _refuse_graphs("context", context, InputError)
    if isinstance(source, dict | tuple) or not isinstance(source, Iterable):
        raise InputError(
            f"a source is an iterable of chunks, a list, a file or a generator, got a {type(source).__name__}; for one "
            "chunk pass [inputs]"
        )
    chunks = Chunks(source, resets, batch_first=network.batch_first)
    return _Walker(network, truncation, chunks, state, lengths, context).windows()


def _refuse_graphs(what: str, tree: Tree, error: type[UnrolledError]) -> None:
    try:
        tensors, structure = flatten(tree)
    except TypeError:
        return  # the first window says what is wrong with it
    for path, leaf in zip(paths(structure), tensors, strict=True):
        if leaf.requires_grad and not leaf.is_leaf:
            raise error(
                f"windows need a {what} of numbers or of leaves of the graph, since each window has a backward pass of "
                f"its own, but {what}{path} was computed from something that requires a gradient; pass its detach()"
            )


class _Walker:
    """One walk over a source: where it is, and what the next window needs of the ones before."""

    def __init__(
        self, network: Network, truncation: Truncation, chunks: Chunks, state: Tree, lengths: Any, context: Tree
    ) -> None:
        self.network, self.truncation, self.chunks = network, truncation, chunks
        self.lengths, self.context = lengths, context
        self.entry, self.overlap, self.begin, self.stop = state, None, 0, 0
        self.random = torch.random.get_rng_state()

    def windows(self) -> Iterator[Window]:
        """Each window, the one before it left."""
        while (new := self.chunks.take(self.truncation.stride)) is not None:
            if not self.stop:
                self.lengths = self._checked_lengths(self.lengths)
            window = self._window(new)
            yield window
            window.leave()
            del window, new
        if self.lengths is not None and self.stop and int(self.lengths.max()) > self.stop:
            row = int(self.lengths.argmax())
            raise InputError(
                f"lengths must be at most the steps of all chunks, {self.stop}, got {int(self.lengths[row])} for row "
                f"{row}; a length counts the steps that are no padding"
            )

    def _checked_lengths(self, lengths: Lengths) -> Tensor | None:
        return None if lengths is None else checked_lengths(lengths, 2**62, self.chunks.batch)

    def _window(self, new: Tree) -> Window:
        steps = new if self.overlap is None else map_leaves(lambda a, b: torch.cat([a, b]), self.overlap, new)
        T, start = len(flatten(steps)[0][0]), self.stop
        self.stop = self.begin + T
        following = max(self.stop + self.truncation.stride - self.truncation.horizon, 0) - self.begin
        tape = self._tape(steps, start - self.begin, T, following)
        outputs, last = tape.results()
        if following:
            at = [piece.span.begin for piece in tape.pieces].index(following) - 1 if following < T else -1
            self.entry, self.begin = tape.states[at], self.begin + following
        self.overlap = map_leaves(lambda x: x[following:].detach(), steps) if following < T else None
        turned = self.network.batch_first
        inputs, outputs = (sequence.swap_time_and_batch(x) if turned else x for x in (new[0], outputs))
        return Window(inputs, outputs, map_leaves(Tensor.detach, last), start, self.stop, tape)

    def _tape(self, steps: Tree, start: int, T: int, following: int) -> Tape:
        again = not self.begin and start > 0
        # An initial state that is drawn at random is the same one each time that copy 0 is run again.
        with torch.random.fork_rng(devices=[], enabled=again):
            if again:
                torch.random.set_rng_state(self.random)
            extent, bounds = Extent(T, self.chunks.batch), {following}.intersection(range(T))
            return Tape(self._run, steps, self.entry, self.context, extent, [Block(start, T, 0)], bounds=bounds)

    def _run(self, steps: Tree, state: Tree, context: Tree, extent: Extent, start: int) -> tuple[Tree, Tree]:
        inputs, resets = steps
        first = self.begin + start
        lengths = None if self.lengths is None else (self.lengths - first).clamp(0, extent.steps)
        given = given_as(inputs, lengths, batch_first=False)
        try:
            outputs, last = self.network.through(given, given.sequences(inputs), state, resets, context)
        except UnrolledError as error:
            error.args = (f"in a window, copies counted from step {first} on: {error}",)
            raise
        return given.outputs(outputs), last
