"""Windows: a text cut into parallel streams, and the streams into consecutive pieces for BPTT."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor


def each_window(numbers: Tensor, batch: int, window: int) -> Iterator[tuple[Tensor, Tensor]]:
    """The windows of a text, in reading order: row b of each window goes on where row b of the last one ended.

    The text is cut into `batch` streams of the same length; up to `batch - 1` characters at its end are left over.

    Args:
        numbers: the text as numbers, `[N]`, with N > batch.
        batch: B, how many streams.
        window: T, characters per window; the last one may be shorter.

    Yields:
        Characters `[T, B]` and the ones to predict from them, each one place further, `[T, B]`.

    Example:
        >>> import torch
        >>> [(x.tolist(), y.tolist()) for x, y in each_window(torch.arange(7), batch=2, window=2)]
        [([[0, 3], [1, 4]], [[1, 4], [2, 5]]), ([[2, 5]], [[3, 6]])]
    """
    length = (len(numbers) - 1) // batch
    characters = numbers[: batch * length].view(batch, length).t()
    following = numbers[1 : batch * length + 1].view(batch, length).t()
    for start in range(0, length, window):
        yield characters[start : start + window], following[start : start + window]


def window_count(characters: int, batch: int, window: int) -> int:
    """How many windows `each_window` yields for a text of so many characters."""
    return -(-((characters - 1) // batch) // window)
