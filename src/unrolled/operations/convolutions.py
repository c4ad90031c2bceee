"""Convolutions as products: what the windows of a row see, a row of a matrix each, times the weights as a matrix.

Places come first and channels last, so that what a window sees are few long runs. A transposed convolution, which the
gradient of the input is, is an ordinary one of the input with zeros between its entries, by weights turned around.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product

from unrolled.operations.joins import Joins
from unrolled.operations.layout import UnsupportedError
from unrolled.operations.nodes import Convolution, Input, View, contiguous, replaced
from unrolled.operations.operation import Operation, lowers
from unrolled.operations.products import Products
from unrolled.operations.spatial import convolution_rows
from unrolled.recording.program import Op


@dataclass(frozen=True)
class _Windows:
    """Along one dimension of places: how many windows there are, and what they see.

    Attributes:
        count: how many.
        size: how many entries a window has.
        stride: from window to window.
        dilation: from entry to entry of a window.
        before: how many zeros come before the input.
        apart: from entry to entry of the input: zeros lie between them.
    """

    count: int
    size: int
    stride: int
    dilation: int
    before: int
    apart: int = 1

    @property
    def length(self) -> int:
        """How far all windows reach together."""
        return (self.count - 1) * self.stride + (self.size - 1) * self.dilation + 1

    def turned(self) -> _Windows:
        """Those of the transposed convolution."""
        before = (self.size - 1) * self.dilation - self.before
        return replace(self, stride=1, before=before, apart=self.stride)


class Convolutions(Joins, Products):
    """Convolutions of any number of dimensions, transposed or not, in groups or not."""

    @lowers("convolution", Operation(convolution_rows))
    def _convolution(self, op: Op) -> list[View]:
        _, _, bias, stride, padding, dilation, transposed, _, groups = op.args
        image, weight, out = self.argument(op, 0), self.argument(op, 1), self.shape_of(op)
        leaf = weight.node
        if self.layout(op).place != 0 or not isinstance(leaf, Input) or leaf.rows:
            raise UnsupportedError("a convolution whose weights are not fixed")
        along = zip(out[1:], weight.dims[2:], stride, dilation, padding, strict=True)
        windows = [_Windows(*numbers) for numbers in along]
        if transposed:
            windows = [window.turned() for window in windows]
            for dim in range(2, len(weight.dims)):
                weight = weight.flipped(dim)
        weight = self._by_group(weight, groups, transposed)
        if groups == image.dims[0]:
            result = self._entry_by_entry(_seen(self._framed(image, windows, 1), windows), weight)
        else:
            result = self._as_products(_seen(self._with_channels_last(image, windows), windows), weight)
        result = self.reshaped(result, out)
        if bias is not None:
            result = self.compute("add", result, _for_places(self.argument(op, 2), len(windows)))
        return [result]

    def _by_group(self, weight: View, groups: int, transposed: bool) -> View:
        """Weights as `[groups, size..., in, out]` of a group."""
        first, second, *size = weight.dims
        strides, many = weight.strides, first // groups
        grouped = replace(weight, dims=(groups, many, second, *size), strides=(strides[0] * many, *strides))
        channels = (1, 2) if transposed else (2, 1)
        return grouped.permuted([0, *range(3, 3 + len(size)), *channels])

    def _with_channels_last(self, image: View, windows: Sequence[_Windows]) -> View:
        """An image `[channels, places...]` as far as windows reach, in memory with each place's channels together."""
        places = len(windows)
        turned = self._framed(image.permuted([*range(1, places + 1), 0]), windows, 0)
        if turned.strides != contiguous(turned.dims) or isinstance(turned.node, Input):
            turned = self.compute("same", turned)
        return turned.permuted([places, *range(places)])

    def _framed(self, view: View, windows: Sequence[_Windows], first: int) -> View:
        """A view whose places, its dimensions from the first on, reach as far as windows do."""
        for dim, window in enumerate(windows, first):
            view = self._as_far_as(view, dim, window)
        return view

    def _as_far_as(self, view: View, dim: int, window: _Windows) -> View:
        """A dimension as long as its windows reach, with zeros where the input has no entries."""
        n, before, apart, length = view.dims[dim], window.before, window.apart, window.length
        first = max(0, -(before // apart))
        last = min(n - 1, (length - 1 - before) // apart)
        kept = self.cut(view, dim, first, max(last - first + 1, 0))
        start = before + first * apart
        if start == 0 and apart == 1 and kept.dims[dim] == length:
            return kept
        return self.padded(kept, replaced(view.dims, dim, length), dim, start, apart)

    def _as_products(self, seen: View, weight: View) -> View:
        """What each group's windows see, times its weights: `[out, count...]`."""
        (groups, *_, inner, outer), places = weight.dims, (len(seen.dims) - 1) // 2
        counts, order = seen.dims[1 : places + 1], [*range(1, len(seen.dims)), 0]
        results = [
            self.add(Convolution((outer, *counts), self.real, part.permuted(order), self.selected(weight, 0, group)))
            for group in range(groups)
            for part in [self.cut(seen, 0, group * inner, inner)]
        ]
        return self.joined((groups * outer, *counts), 0, results, self.real)

    def _entry_by_entry(self, seen: View, weight: View) -> View:
        """Where each channel is a group, `[channels, out, count...]`: an entry of all windows after the other."""
        places = (len(seen.dims) - 1) // 2
        total: View | None = None
        for entry in product(*map(range, weight.dims[1 : places + 1])):
            numbers, factors = seen, self.selected(weight, len(weight.dims) - 2, 0)
            for place in reversed(entry):
                numbers = self.selected(numbers, len(numbers.dims) - 1, place)
                factors = self.selected(factors, len(factors.dims) - 2, place)
            term = self.compute("mul", numbers.unsqueezed(1), _for_places(factors, places))
            total = term if total is None else self.compute("add", total, term)
        assert total is not None
        return total


def _seen(view: View, windows: Sequence[_Windows]) -> View:
    """What each window sees of an image `[channels, places...]`: `[channels, count..., size...]`."""
    channels, *steps = view.strides
    counts, sizes = [window.count for window in windows], [window.size for window in windows]
    from_window = (step * window.stride for step, window in zip(steps, windows, strict=True))
    from_entry = (step * window.dilation for step, window in zip(steps, windows, strict=True))
    dims, strides = (view.dims[0], *counts, *sizes), (channels, *from_window, *from_entry)
    return View(view.node, dims, strides, view.offset)


def _for_places(view: View, places: int) -> View:
    """A number for each channel, as one for all places of it."""
    for _ in range(places):
        view = view.unsqueezed(len(view.dims))
    return view
