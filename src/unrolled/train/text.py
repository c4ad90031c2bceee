"""The text: read, checked, split, turned into numbers and cut into windows."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from unrolled.errors import DataError

BUILT_IN = "pydoc_data.topics"
"""The English text that every Python carries: the help pages of the language."""


@dataclass(frozen=True)
class Split:
    """A text in three consecutive parts: 90 % to train on, 5 % to validate on, 5 % to test on."""

    train: str
    validation: str
    test: str


def read_text(path: Path | None) -> str:
    """Read a UTF-8 text, or the one that ships with Python.

    Args:
        path: the file; None for the text inside Python.

    Raises:
        DataError: if the file is missing, a directory, empty, binary or not UTF-8.
    """
    if path is None:
        from pydoc_data.topics import topics

        return "\n".join(topics[name] for name in sorted(topics))
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise DataError(f"text file {path} cannot be read: {error.strerror}; give the path of a UTF-8 text") from error
    if not raw:
        raise DataError(f"text file {path} is empty; give a text of some thousand characters")
    if b"\0" in raw:
        raise DataError(f"text file {path} is binary (zero byte at {raw.index(0)}); give a plain UTF-8 text")
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(
            f"text file {path} is not UTF-8 (byte {error.start} is 0x{raw[error.start]:02x}); "
            "convert it, for instance with: iconv -f LATIN1 -t UTF-8"
        ) from error


def split_text(text: str, *, batch: int, window: int) -> Split:
    """Split a text 90/5/5.

    Raises:
        DataError: if a part is too short: the training part must fill one window in each of the batch's streams.
    """
    first, second = len(text) * 90 // 100, len(text) * 95 // 100
    split = Split(text[:first], text[first:second], text[second:])
    needed = batch * (window + 1)
    if len(split.train) < needed or len(split.validation) < 2:
        least = max(-(-needed * 100 // 90), 40)
        raise DataError(
            f"the text has {len(text):,} characters, but batch {batch} x window {window} needs at least {least:,}; "
            "give a longer text, or a smaller --batch or --window"
        )
    return split


class Vocabulary:
    """The characters a model knows, each with its number. Number 0 stands for every character that it does not know.

    Args:
        characters: the known characters, in order.

    Example:
        >>> Vocabulary("ab").encode("abc").tolist()
        [1, 2, 0]
    """

    unknown = "\N{REPLACEMENT CHARACTER}"

    def __init__(self, characters: str) -> None:
        self.characters = characters
        self._numbers = {character: number for number, character in enumerate(characters, start=1)}

    @classmethod
    def of(cls, text: str) -> Vocabulary:
        """The characters of a text, sorted."""
        return cls("".join(sorted(set(text))))

    def __len__(self) -> int:
        return len(self.characters) + 1

    def encode(self, text: str) -> Tensor:
        """Numbers `[len(text)]`, int64."""
        return torch.tensor([self._numbers.get(character, 0) for character in text], dtype=torch.int64)

    def decode(self, number: int) -> str:
        """The character of a number."""
        return self.characters[number - 1] if number else self.unknown

    def missing(self, text: str) -> str:
        """The characters of a text that have no number of their own."""
        return "".join(sorted(set(text) - set(self.characters)))


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
