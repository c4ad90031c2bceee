"""Drawing, from the front: options are checked, the network is measured, rendered, and written to a file."""

from __future__ import annotations

import os
import sys
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from unrolled.drawing.measuring import portrait
from unrolled.drawing.paper import PICTURES, chart_picture, converted
from unrolled.drawing.probe import sketches_of
from unrolled.drawing.sketch import Sketch
from unrolled.drawing.svg import svg
from unrolled.drawing.text import text
from unrolled.drawing.webpage import webpage
from unrolled.errors import InputError, OptionError
from unrolled.lengths import Lengths
from unrolled.trees import Tree


def draw(
    rnn: nn.Module,
    inputs: Tree,
    path: str | os.PathLike[str] | None = None,
    *,
    loss: Callable[[Any, Any], Tensor] | None = None,
    chart: str | None = None,
    row: int = 0,
    horizon: int | None = None,
    state: Tree = None,
    lengths: Lengths = None,
    resets: Tensor | None = None,
    context: Tree = None,
) -> Path | None:
    """Draw an unrolled network: the rolled cell, its copies, what they hand on and what they share.

    A page (.html) is one file that opens from disk: the network to unfold and walk through, what goes in and out of its
    copies, the plan of its cell, and with a loss its gradients, figures and a verdict. The other endings give one
    picture: of the network in the textbook's style, or of one chart. Layers and directions are drawn in the order in
    which they run. Random state, buffers and `.grad` stay as they were.

    Args:
        rnn: what `unroll`, `stack` or `Bidirectional` made, or a `RNN`, `LSTM` or `GRU` layer of this package.
        inputs: a pytree of `[T, B, ...]` (`[B, T, ...]` with `batch_first`).
        path: a file ending in .html, .svg, .png, .pdf or .txt; by default the picture is printed as text.
        loss: `loss(outputs, state)`, a scalar, whose gradients a page or a chart shows.
        chart: for a picture, what is drawn in place of the network: 'flow', 'lag', 'shares', 'saturation', 'states',
            'jacobian', 'schedule' or 'memory'; in a network of several layers 'flow 0', 'flow 1', ...
        row: which row of the batch a page's strips show.
        horizon: how many copies gradients flow back through in training, for the verdict; by default the network's own.
        state: the state copy 0 receives, as `rnn` takes it; by default the cell's own.
        lengths: for a page or a chart how many steps each row has, as `rnn` takes them.
        resets: for a page or a chart the rows that start from a fresh state, as `rnn` takes them.
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
    target = None if path is None else _checked_path(path)
    kind = "" if target is None else target.suffix.lower()
    _refuse_unused(kind, loss, chart, row, lengths, resets)
    if isinstance(inputs, PackedSequence):
        raise InputError("draw takes no PackedSequence; pad it: torch.nn.utils.rnn.pad_packed_sequence")
    options: dict[str, Any] = {"state": state, "lengths": lengths, "resets": resets, "context": context}
    if target is None:
        _print(*sketches_of(rnn, inputs, state, context))
        return None
    if kind == ".html":
        content = webpage(portrait(rnn, inputs, loss, **options, row=row, horizon=horizon)).encode()
    elif chart is not None:
        content = chart_picture(portrait(rnn, inputs, loss, **options).chart(chart), kind)
    elif kind == ".txt":
        content = text(*sketches_of(rnn, inputs, state, context)).encode()
    else:
        content = converted(svg(*sketches_of(rnn, inputs, state, context)), kind)
    _write_picture(target, content)
    return target


def _refuse_unused(kind: str, loss: Any, chart: Any, row: Any, lengths: Any, resets: Any) -> None:
    """Refuse what a picture of this kind would not show."""
    if chart is not None and kind not in PICTURES:
        got = f"a {kind} file" if kind else "no path"
        raise OptionError(f"chart= draws a picture ({', '.join(PICTURES)}), got {got}; a page has all charts anyway")
    if loss is not None and not callable(loss):
        raise OptionError(f"loss must be a function loss(outputs, state) of a scalar, got a {type(loss).__name__}")
    if isinstance(row, bool) or not isinstance(row, int):
        raise InputError(f"row must be an integer, got {row!r}")
    if kind == ".html" or chart is not None:
        return
    values = {"loss": loss, "row": row or None, "lengths": lengths, "resets": resets}
    unused = [name for name, value in values.items() if value is not None]
    if unused:
        raise OptionError(
            f"a picture of the network shows nothing of {unused[0]}=; leave it out, name a chart (chart='flow'), or "
            "draw a page (.html)"
        )


def _print(*sketches: Sketch) -> None:
    """Print the picture, in ASCII where the terminal's encoding lacks a character of it."""
    picture, encoding = text(*sketches), getattr(sys.stdout, "encoding", None)
    try:
        picture.encode(encoding or "utf-8")
    except UnicodeEncodeError:
        picture = text(*sketches, ascii=True)
    print(picture, end="")


def _checked_path(path: str | os.PathLike[str]) -> Path:
    """The file, once it is clear that it can be written."""
    endings = (".html", *PICTURES, ".txt")
    offered = f"{', '.join(endings[:-1])} or {endings[-1]}"
    try:
        target = Path(path)
    except TypeError as error:
        raise OptionError(f"path must be a str or a Path ending in {offered}, got {path!r:.80}") from error
    if target.suffix.lower() not in endings:
        raise OptionError(f"path must end in {offered}, got {str(target)!r}; leave path out to print the picture")
    try:
        there = target.parent.is_dir()
        target.exists()
    except (OSError, ValueError) as error:  # a name that is too long, or has a zero in it
        raise OptionError(f"path must be a name that the system takes, got {str(target)!r:.80}: {error}") from error
    if not there:
        raise OptionError(f"path must be in a directory that exists, got {str(target)!r}; create {target.parent} first")
    if target.is_dir():
        raise OptionError(f"path must be a file, got the directory {str(target)!r}; name a file in it")
    if not os.access(target if target.exists() else target.parent, os.W_OK):
        raise OptionError(f"path must be writable, got {str(target)!r}; change its permissions or choose another")
    return target


def _write_picture(target: Path, content: bytes) -> None:
    """Write the whole file or, if that fails, none of it."""
    final = target.resolve()
    part = final.with_name(f".{uuid.uuid4().hex}.part")
    try:
        part.write_bytes(content)
        part.replace(final)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise OptionError(f"path must be writable, got {str(target)!r}: {error}; choose another") from error
