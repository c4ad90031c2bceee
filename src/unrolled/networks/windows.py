"""Windows: truncated BPTT over a sequence that is longer than memory."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from unrolled import sequence
from unrolled.bptt.own_backward import reason_expired
from unrolled.bptt.segments import SequenceRun
from unrolled.bptt.truncated import TapedRun
from unrolled.bptt.truncation import Block, Truncation
from unrolled.errors import GradientError, InputError, OptionError, StateError, UnrolledError
from unrolled.lengths import Extent, Lengths, checked_lengths
from unrolled.networks.chunks import Chunks
from unrolled.networks.layout import BatchLayout, given_as
from unrolled.trees import Tree, flatten, map_leaves, paths


class Window:
    """Some new steps of a long sequence, and the way back through a horizon of copies; made by `windows`.

    Attributes:
        inputs: of the new steps, `[n, B, ...]` (`[B, n, ...]` with `batch_first`), n = stride or fewer at the end.
        outputs: of the new steps.
        state: what the last copy handed on; no gradient flows back from it.
        start: the first new step, counted from the beginning of the source.
        stop: one past the last new step.

    Example:
        >>> import torch, unrolled as ur
        >>> rnn = ur.unroll(ur.GRUCell(3, 4), horizon=4)
        >>> [window.outputs.shape[0] for window in rnn.windows([torch.randn(10, 2, 3)])]
        [4, 4, 2]
    """

    def __init__(self, inputs: Tree, outputs: Tree, state: Tree, start: int, stop: int, tape: TapedRun) -> None:
        self.inputs, self.outputs, self.state = inputs, outputs, state
        self.start, self.stop = start, stop
        self._expiry = tape.expiry
        self._walked = False

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of this window's loss to `.grad`, once; nothing is added if it is refused.

        Args:
            loss: a scalar made of this window's outputs.

        Raises:
            GradientError: if it was called before, or if the loss needs outputs of a window that has been left.
        """
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            told = f"a tensor of shape {list(loss.shape)}" if isinstance(loss, Tensor) else f"a {type(loss).__name__}"
            raise GradientError(
                f"the loss of {_steps(self)} must be a scalar tensor, got {told}; sum it up, or mean it"
            )
        left = self._expiry.reason or reason_expired(loss)
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
        self._expiry.expire(
            f"the loss needs outputs of {_steps(self)}, a window that was left when the next one began; take each "
            "window's loss while it lasts: window.backward(loss), and detach() what you keep of it"
        )

    def __repr__(self) -> str:
        return f"Window({_steps(self)})"


def _steps(window: Window) -> str:
    return f"steps {window.start} to {window.stop - 1}"


class Windowed:
    """A network that gradients may flow back through for a horizon of copies only.

    Attributes:
        truncation: how far gradients flow back, and how often losses are taken; None for all copies.
    """

    truncation: Truncation | None
    batch_first: bool

    @property
    def horizon(self) -> int | None:
        """How many copies gradients flow back through; None for all of them."""
        return self.truncation.horizon if self.truncation else None

    @property
    def stride(self) -> int | None:
        """How many steps have their losses taken together; None for all of them."""
        return self.truncation.stride if self.truncation else None

    def through(
        self, given: BatchLayout, steps: Tree, state: Tree, resets: Tensor | None, context: Tree
    ) -> tuple[Tree, Tree]:
        """Run over sequences that are laid out as engines take them."""
        raise NotImplementedError

    def windows(
        self,
        source: Iterable[Tree],
        state: Tree = None,
        *,
        lengths: Lengths = None,
        resets: Iterable[Tensor] | None = None,
        context: Tree = None,
    ) -> Iterator[Window]:
        """Truncated BPTT over a sequence that is longer than memory, with updates of the weights between windows.

        Each window has `stride` new steps (the last one may have fewer) and goes back through `horizon` copies: the
        horizon - stride copies before its new steps are run again, with the current weights, from the state that the
        window before had there. One window is held at a time. Inputs of the overlap are kept as numbers: what made them
        gets its gradients from the window in which they were new, and needs chunks of `stride` steps for that.

        Args:
            source: an iterable of chunks, pytrees of `[t, B, ...]` (`[B, t, ...]` with `batch_first`), t as you like.
            state: what each row's first copy receives: numbers, or leaves of a graph; by default the cell's own.
            lengths: how many steps each row has in all chunks together, integers `[B]`.
            resets: an iterable beside the source, for each chunk a bool `[t, B]` (`[B, t]`): rows that start afresh.
                It is a second one, and no part of the chunks, because a chunk is whatever tree the cell reads.
            context: what a cell with a third argument receives at every step: numbers, or leaves of a graph.

        Yields:
            A `Window`. Where its `backward` is not called (as in evaluation) the next one begins all the same.

        Raises:
            OptionError: for a network without a horizon.
            InputError: for a reversed network, for chunks that differ in B, structure or dtype, naming the chunk, and
                for a context that is neither numbers nor a leaf.
            StateError: for a state that is neither.

        Example:
            >>> import torch, unrolled as ur
            >>> rnn = ur.unroll(ur.GRUCell(3, 4), horizon=6, stride=3)
            >>> for window in rnn.windows(torch.randn(5, 2, 3) for _ in range(2)):
            ...     window.backward(window.outputs.pow(2).mean())
            ...     print(window.start, window.stop)
            0 3
            3 6
            6 9
            9 10
        """
        return _each_window(self, self.truncation, source, state, lengths=lengths, resets=resets, context=context)


def _each_window(
    network: Windowed,
    truncation: Truncation | None,
    source: Iterable[Tree],
    state: Tree,
    *,
    lengths: Lengths,
    resets: Iterable[Tensor] | None,
    context: Tree,
) -> Iterator[Window]:
    """The windows of a source; what is refused beforehand is refused now, not by `next`."""
    if truncation is None:
        raise OptionError(
            f"windows need a horizon, this {type(network).__name__} has none; make it with horizon=k2, stride=k1"
        )
    if getattr(network, "reverse", False):
        raise InputError(
            "a reversed network begins at the end, which a source has not reached yet; run windows forwards, or the "
            "whole sequence in one call"
        )
    _refuse_graphs("state", state, StateError)
    _refuse_graphs("context", context, InputError)
    if isinstance(source, dict | Tensor) or not isinstance(source, Iterable):
        raise InputError(
            f"a source is an iterable of chunks, such as a list or a generator, got a {type(source).__name__}; for one "
            "chunk pass [inputs], for more of them inputs.split(steps)"
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
        self, network: Windowed, truncation: Truncation, chunks: Chunks, state: Tree, lengths: Any, context: Tree
    ) -> None:
        self.network, self.truncation, self.chunks = network, truncation, chunks
        self.lengths, self.context = lengths, context
        self.entry, self.overlap, self.begin, self.stop = state, None, 0, 0
        self.random: Tensor | None = None

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
            at = [taped.segment.begin for taped in tape.segments].index(following) - 1 if following < T else -1
            self.entry, self.begin = tape.states[at], self.begin + following
        self.overlap = map_leaves(lambda x: x[following:].detach(), steps) if following < T else None
        turned = self.network.batch_first
        inputs, outputs = (sequence.swap_time_and_batch(x) if turned else x for x in (new[0], outputs))
        return Window(inputs, outputs, map_leaves(Tensor.detach, last), start, self.stop, tape)

    def _tape(self, steps: Tree, start: int, T: int, following: int) -> TapedRun:
        again = not self.begin and start > 0
        # An initial state that is drawn at random is the same one each time that copy 0 is run again.
        with torch.random.fork_rng(devices=[], enabled=again):
            if again and self.random is not None:
                torch.random.set_rng_state(self.random)
            elif self.random is None:
                self.random = torch.random.get_rng_state()
            extent, bounds = Extent(T, self.chunks.batch), {following}.intersection(range(T))
            whole = SequenceRun(self._run, steps, self.entry, self.context, extent, False, self.network)
            return TapedRun(whole, [Block(start, T, 0)], bounds=bounds)

    def _run(self, steps: Tree, state: Tree, context: Tree, extent: Extent, start: int) -> tuple[Tree, Tree]:
        (inputs, resets), first = steps, self.begin + start
        lengths = None if self.lengths is None else (self.lengths - first).clamp(0, extent.steps)
        given = given_as(inputs, lengths, batch_first=False)
        try:
            outputs, last = self.network.through(given, given.sequences(inputs), state, resets, context)
        except UnrolledError as error:
            error.args = (f"in a window, copies counted from step {first} on: {error}",)
            raise
        return given.outputs(outputs), last
