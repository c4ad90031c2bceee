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
        seen = self._seen(image, windows)
        weight = self._by_group(weight, groups, transposed)
        by_channel = groups == image.dims[0]
        result = self._tap_by_tap(seen, weight) if by_channel else self._as_products(seen, weight)
        places = len(windows)
        result = self.reshaped(result, (*out[1:], out[0])).permuted([places, *range(places)])
        return [result if bias is None else self._biased(result, self.argument(op, 2))]

    def _biased(self, result: View, bias: View) -> View:
        for dim in range(1, len(result.dims)):
            bias = bias.unsqueezed(dim)
        return self.compute("add", result, bias)

    def _by_group(self, weight: View, groups: int, transposed: bool) -> View:
        """Weights as `[groups, size..., in, out]` of a group."""
        first, second, *size = weight.dims
        strides, many = weight.strides, first // groups
        grouped = replace(weight, dims=(groups, many, second, *size), strides=(strides[0] * many, *strides))
        channels = (1, 2) if transposed else (2, 1)
        return grouped.permuted([0, *range(3, 3 + len(size)), *channels])

    def _seen(self, image: View, windows: Sequence[_Windows]) -> View:
        """What each window sees: `[count..., size..., channels]`."""
        places = len(windows)
        view = image.permuted([*range(1, places + 1), 0])
        for dim, window in enumerate(windows):
            view = self._framed(view, dim, window)
        if view.strides != contiguous(view.dims) or isinstance(view.node, Input):
            view = self.compute("same", view)
        steps = view.strides[:places]
        return View(
            view.node,
            (*(window.count for window in windows), *(window.size for window in windows), image.dims[0]),
            (
                *(step * window.stride for step, window in zip(steps, windows, strict=True)),
                *(step * window.dilation for step, window in zip(steps, windows, strict=True)),
                view.strides[-1],
            ),
            view.offset,
        )

    def _framed(self, view: View, dim: int, window: _Windows) -> View:
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
        """What each group's windows see, times its weights: `[count..., out]`."""
        (groups, *_, inner, outer), channels = weight.dims, len(seen.dims) - 1
        counts = seen.dims[: channels // 2]
        results = [
            self.add(Convolution((*counts, outer), self.real, part, self.selected(weight, 0, group)))
            for group in range(groups)
            for part in [self.cut(seen, channels, group * inner, inner)]
        ]
        return self.joined((*counts, groups * outer), len(counts), results, self.real)

    def _tap_by_tap(self, seen: View, weight: View) -> View:
        """Where each channel is a group: entry after entry of all windows, times a number for each channel."""
        places = (len(seen.dims) - 1) // 2
        total: View | None = None
        for tap in product(*map(range, weight.dims[1 : places + 1])):
            entries, factors = seen, self.selected(weight, len(weight.dims) - 2, 0)
            for place in reversed(tap):
                entries = self.selected(entries, len(entries.dims) - 2, place)
                factors = self.selected(factors, len(factors.dims) - 2, place)
            term = self.compute("mul", entries.unsqueezed(len(entries.dims)), factors)
            total = term if total is None else self.compute("add", total, term)
        assert total is not None
        return total
