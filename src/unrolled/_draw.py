"""Drawing an unrolled network: one step tells all that a picture needs."""

from __future__ import annotations

import os
import sys
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path

from torch import nn
from torch.nn.utils.rnn import PackedSequence

from unrolled._layers import TorchLayer
from unrolled._probe import probed
from unrolled._stack import Layered
from unrolled._unroll import Unrolled
from unrolled.drawing import Sketch
from unrolled.drawing.svg import svg
from unrolled.drawing.text import text
from unrolled.errors import InputError, OptionError
from unrolled.trees import Tree

__all__ = ["draw"]

RENDERERS: dict[str, Callable[..., str]] = {".svg": svg, ".txt": text}
"""What draws a file, by its suffix."""


def draw(
    rnn: nn.Module,
    inputs: Tree,
    path: str | os.PathLike[str] | None = None,
    *,
    state: Tree = None,
    context: Tree = None,
) -> Path | None:
    """Draw an unrolled network: the rolled cell, its copies, what they hand on and what they share.

    Layers and directions are drawn one below the other, in the order in which they run. One step of each is run to
    learn the shapes, without gradients; random state, buffers and `.grad` stay as they were.

    Args:
        rnn: what `unroll`, `stack` or `Bidirectional` made, or a `RNN`, `LSTM` or `GRU` layer of this package.
        inputs: a pytree of `[T, B, ...]` (`[B, T, ...]` with `batch_first`).
        path: a file ending in .svg or .txt; by default the picture is printed as text.
        state: the state copy 0 receives, as `rnn` takes it; by default the cell's own.
        context: what a cell with a third argument receives at every step.

    Returns:
        The path of the file that was written, or None where the picture was printed.

    Raises:
        OptionError: if `rnn` is no unrolled network, or for a path of another kind, or one that cannot be written.
        InputError: as the call itself does.
        StateError: as the call itself does.
        CellError: as the call itself does.

    Example:
        >>> import torch, unrolled as ur
        >>> draw(ur.unroll(ur.RNNCell(3, 4)), torch.randn(2, 5, 3))  # doctest: +ELLIPSIS
        RNNCell
        unrolled over T = 2 time steps, batch B = 5
        ...
    """
    if path is None:
        _print(_sketches(rnn, inputs, state, context))
        return None
    target, render = _destination(path)
    _write(target, render(*_sketches(rnn, inputs, state, context)))
    return target


def _sketches(rnn: nn.Module, inputs: Tree, state: Tree, context: Tree) -> tuple[Sketch, ...]:
    if isinstance(inputs, PackedSequence):
        raise InputError("draw takes no PackedSequence; pad it: torch.nn.utils.rnn.pad_packed_sequence")
    if isinstance(rnn, TorchLayer):
        rnn, inputs, state = rnn.prepared(inputs, state)
    if not isinstance(rnn, Unrolled | Layered):
        raise OptionError(
            f"draw takes what unroll or stack made, got a {type(rnn).__name__}; wrap its cell: ur.unroll(cell)"
        )
    return probed(rnn, inputs, state, context)


def _print(sketches: Sequence[Sketch]) -> None:
    """Print the picture, in ASCII where the terminal's encoding lacks a character of it."""
    picture, encoding = text(*sketches), getattr(sys.stdout, "encoding", None)
    try:
        picture.encode(encoding or "utf-8")
    except UnicodeEncodeError:
        picture = text(*sketches, ascii=True)
    print(picture, end="")


def _destination(path: str | os.PathLike[str]) -> tuple[Path, Callable[[Sketch], str]]:
    """The file and what draws it, once it is clear that it can be written."""
    offered = " or ".join(RENDERERS)
    try:
        target = Path(path)
    except TypeError as error:
        raise OptionError(f"path must be a str or a Path ending in {offered}, got {path!r:.80}") from error
    if target.suffix.lower() not in RENDERERS:
        raise OptionError(f"path must end in {offered}, got {str(target)!r}; leave path out to print the picture")
    if not target.parent.is_dir():
        raise OptionError(f"path must be in a directory that exists, got {str(target)!r}; create {target.parent} first")
    if target.is_dir():
        raise OptionError(f"path must be a file, got the directory {str(target)!r}; name a file in it")
    if not os.access(target if target.exists() else target.parent, os.W_OK):
        raise OptionError(f"path must be writable, got {str(target)!r}; change its permissions or choose another")
    return target, RENDERERS[target.suffix.lower()]


def _write(target: Path, picture: str) -> None:
    """Write the whole file or, if that fails, none of it."""
    final = target.resolve()
    part = final.with_name(f".{uuid.uuid4().hex}.part")
    try:
        part.write_text(picture, encoding="utf-8", newline="\n")
        part.replace(final)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise OptionError(f"path must be writable, got {str(target)!r}: {error}; choose another") from error
