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
from unrolled.networks.layout import Call
from unrolled.trees import Tree, TreeSpec, describe, leaves, map_leaves, named_leaves


class Window:
    """Some new steps of a long sequence, and the way back through a horizon of copies; made by `windows`.

    Attributes:
        inputs: of the new steps, `[n, B, ...]` (`[B, n, ...]` with `batch_first`), n = stride or fewer at the end.
        outputs: of the new steps.
        state: that after the last copy; no gradient flows back from it.
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
            got = f"a tensor of shape {list(loss.shape)}" if isinstance(loss, Tensor) else f"a {type(loss).__name__}"
            raise GradientError(f"the loss of {self._steps} must be a scalar tensor, got {got}; sum it up, or mean it")
        left = self._expiry.reason or reason_expired(loss)
        if left is not None:
            raise GradientError(left)
        if self._had_backward:
            raise GradientError(
                f"the window of {self._steps} has had its backward pass; add up its losses and call backward once"
            )
        if not loss.requires_grad:
            raise GradientError(
                f"the loss of {self._steps} leads back to no parameter; make it of window.outputs, without "
                "detach() or no_grad()"
            )
        self._had_backward = True
        loss.backward()

    def leave(self) -> None:
        """Give up what a backward pass would need: the next window begins."""
        self._expiry.expire(
            f"the loss needs outputs of {self._steps}, a window that was left when the next one began; take each "
            "window's loss while it lasts: window.backward(loss), and detach() what you keep of it"
        )

    @property
    def _steps(self) -> str:
        return f"steps {self.start} to {self.stop - 1}"

    def __repr__(self) -> str:
        return f"Window({self._steps})"


def iterate_windows(
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
    chunks = _Chunks(source, resets, batch_first=network.batch_first)
    return _Windows(network, run, network.truncation, chunks, state, lengths, context).each()


def _refuse_graphs(what: str, tree: Tree, error: type[UnrolledError]) -> None:
    try:
        found = named_leaves(tree, what)
    except TypeError:
        return  # the first window says what is wrong with it
    for name, leaf in found:
        if leaf.requires_grad and not leaf.is_leaf:
            raise error(
                f"windows need a {what} of numbers or of leaves of the graph, since each window has a backward pass of "
                f"its own, but {name} was computed from something that requires a gradient; pass its detach()"
            )


class _Windows:
    """The windows of one source: where they are, and what the next one needs of the ones before."""

    def __init__(
        self,
        network: Network,
        run: Callable[[Call], tuple[Tree, Tree]],
        truncation: Truncation,
        chunks: _Chunks,
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
        T, start = _length(steps), self.stop
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


_NO_MORE: Any = object()


class _Chunks:
    """Chunks of any lengths, cut anew into runs of the steps that `take` wants; at most one chunk is held beyond these.

    Args:
        source: an iterable of pytrees of `[t, B, ...]` (`[B, t, ...]` with `batch_first`).
        resets: an iterable with a bool `[t, B]` for each chunk, or None.
        batch_first: whether chunks are `[B, t, ...]`.

    Example:
        >>> chunks = _Chunks(torch.arange(10).view(2, 5, 1), None)
        >>> [chunks.take(4)[0].flatten().tolist() for _ in range(3)]
        [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    """

    def __init__(self, source: Iterable[Tree], resets: Iterable[Tensor] | None, *, batch_first: bool = False) -> None:
        self._pairs = self._each(iter(source), None if resets is None else iter(resets))
        self._batch_first = batch_first
        self._first: Tree = None
        self._left: Tree = None
        self.batch = 0

    def take(self, steps: int) -> Tree:
        """The next steps as `(inputs, resets)`, each `[n, B, ...]` with n = `steps`; fewer at the end, None after it.

        Raises:
            InputError: for a chunk that is not like the first one, naming it.
        """
        parts: list[Tree] = []
        missing = steps
        while missing:
            if self._left is None:
                self._left = next(self._pairs, None)
                if self._left is None:
                    break
            have = _length(self._left)
            parts.append(map_leaves(lambda x, n=missing: x[:n], self._left))
            self._left = map_leaves(lambda x, n=missing: x[n:], self._left) if have > missing else None
            missing -= min(have, missing)
        return map_leaves(lambda *leaves: torch.cat(leaves), *parts) if len(parts) > 1 else next(iter(parts), None)

    def _each(self, source: Iterator[Tree], resets: Iterator[Tensor] | None) -> Iterator[Tree]:
        for number, chunk in enumerate(source):
            steps = self._checked(number, chunk)
            mask = None if resets is None else self._checked_mask(number, _length(steps), next(resets, _NO_MORE))
            yield steps, mask
        if resets is not None and next(resets, _NO_MORE) is not _NO_MORE:
            raise InputError("resets must have one mask for each chunk of the source, got more; end both together")

    def _checked(self, number: int, chunk: Tree) -> Tree:
        try:
            _, B = sequence.sizes(chunk, batch_first=self._batch_first)
        except InputError as error:
            raise InputError(f"chunk {number}: {error}") from error
        steps = sequence.swap_time_and_batch(chunk) if self._batch_first else chunk
        if self._first is None:
            self._first, self.batch = map_leaves(lambda x: x[:0].detach(), steps), B
        elif TreeSpec.of(steps, 1) != TreeSpec.of(self._first, 1):
            raise InputError(
                f"all chunks must have the B, structure, dtypes and features of the first, "
                f"{describe(_step(self._first))} in each step, but chunk {number} has {describe(_step(steps))}; make "
                "the source yield chunks of one kind, or begin windows() anew for another batch"
            )
        return steps

    def _checked_mask(self, number: int, steps: int, mask: Any) -> Tensor:
        wanted = (self.batch, steps) if self._batch_first else (steps, self.batch)
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool or mask.shape != wanted:
            got = f"{mask.dtype} {list(mask.shape)}" if isinstance(mask, Tensor) else type(mask).__name__
            got = "none" if mask is _NO_MORE else got
            raise InputError(f"resets of chunk {number} must be a bool tensor {list(wanted)}, got {got}")
        return mask.T if self._batch_first else mask


def _length(pair: Tree) -> int:
    return len(leaves(pair)[0])


def _step(steps: Tree) -> Tree:
    return map_leaves(lambda x: x.new_empty(x.shape[1:]), steps)
