"""Windows: truncated BPTT over a sequence that is longer than memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from unrolled import sequence
from unrolled.bptt.own_backward import reason_expired
from unrolled.bptt.segments import SequenceRun
from unrolled.bptt.truncated import TapedRun
from unrolled.bptt.truncation import LossBlock, Truncation
from unrolled.errors import GradientError, InputError, OptionError, StateError, UnrolledError
from unrolled.lengths import Extent, Lengths, checked_lengths
from unrolled.networks.base import Network
from unrolled.networks.chunks import Chunks
from unrolled.networks.layout import Call
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
        self._had_backward = False

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
        if self._had_backward:
            raise GradientError(
                f"the window of {_steps(self)} has had its backward pass; add up its losses and call backward once"
            )
        if not loss.requires_grad:
            raise GradientError(
                f"the loss of {_steps(self)} leads back to no parameter; make it of window.outputs, without "
                "detach() or no_grad()"
            )
        self._had_backward = True
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


def each_window(
    network: Network,
    run: Callable[[Call], tuple[Tree, Tree]],
    source: Iterable[Tree],
    state: Tree,
    *,
    lengths: Lengths,
    resets: Iterable[Tensor] | None,
    context: Tree,
) -> Iterator[Window]:
    """The windows of a source, see `BoundedNetwork.windows`; what is refused is refused now, not by `next`.

    Args:
        network: the network.
        run: runs a call of it.
        source: the chunks.
        state: what each row's first copy receives, or None.
        lengths: how many steps each row has in all chunks together, or None.
        resets: a mask for each chunk, or None.
        context: what is the same at every step, or None.
    """
    if network.truncation is None:
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
    return _Windows(network, run, network.truncation, chunks, state, lengths, context).each()


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


class _Windows:
    """The windows of one source: where they are, and what the next one needs of the ones before."""

    def __init__(
        self,
        network: Network,
        run: Callable[[Call], tuple[Tree, Tree]],
        truncation: Truncation,
        chunks: Chunks,
        state: Tree,
        lengths: Any,
        context: Tree,
    ) -> None:
        self.network, self.run, self.truncation, self.chunks = network, run, truncation, chunks
        self.lengths, self.context = lengths, context
        self.entry, self.overlap, self.begin, self.stop = state, None, 0, 0
        self.random: Tensor | None = None

    def each(self) -> Iterator[Window]:
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
            return TapedRun(whole, [LossBlock(start, T, 0)], bounds=bounds)

    def _run(self, steps: Tree, state: Tree, context: Tree, extent: Extent, start: int) -> tuple[Tree, Tree]:
        (inputs, resets), first = steps, self.begin + start
        lengths = None if self.lengths is None else (self.lengths - first).clamp(0, extent.steps)
        call = Call.of(inputs, state, lengths=lengths, resets=resets, context=context)
        try:
            outputs, last = self.run(call)
        except UnrolledError as error:
            error.args = (f"in a window, copies counted from step {first} on: {error}",)
            raise
        return call.layout.outputs(outputs), last
