"""How training looks in a terminal."""

from __future__ import annotations

import math

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from unrolled.train.baselines import Baseline
from unrolled.train.loop import Epoch, Update


def terminal(*, stderr: bool = False) -> Console:
    """A console that prints what it is given: nothing in a path or a text is markup, an emoji code or a number."""
    return Console(stderr=stderr, markup=False, emoji=False, highlight=False)


class ProgressBar:
    """A bar with loss, bits per character, characters per second and time left; a line for each epoch.

    Args:
        console: where it goes; without a terminal only the epochs' lines are printed.
    """

    def __init__(self, console: Console) -> None:
        self._progress = Progress(
            TextColumn("training", style="bold", markup=False),
            BarColumn(bar_width=24),
            TextColumn("{task.percentage:>3.0f}%  {task.fields[figures]}"),
            TimeRemainingColumn(),
            console=console,
            transient=True,
        )
        self._task = self._progress.add_task("", total=None, figures="")
        self._smooth: tuple[float, float] | None = None

    def __enter__(self) -> ProgressBar:
        self._progress.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._progress.stop()

    def updated(self, update: Update) -> None:
        """Move the bar on."""
        now = (update.loss, update.characters_per_second)
        before = self._smooth or now
        loss, speed = self._smooth = (0.95 * before[0] + 0.05 * now[0], 0.95 * before[1] + 0.05 * now[1])
        figures = f"loss {loss:.3f}  {loss / math.log(2):.3f} bits/char  {speed:,.0f} chars/s"
        self._progress.update(self._task, total=update.total, completed=update.number, figures=figures)

    def epoch_ended(self, epoch: Epoch) -> None:
        """Print the epoch's line."""
        self._progress.console.print(
            f"epoch {epoch.number:>2}/{epoch.total}   train {epoch.train_bits:.3f}   "
            f"validation {epoch.validation_bits:.3f} bits per character"
        )


def score_table(name: str, bits: float, others: list[Baseline]) -> Table:
    """The test score next to what simpler models reach on the same text, best first."""
    table = Table("on the test text", "bits per character", box=None, padding=(0, 2, 0, 0))
    table.columns[1].justify = "right"
    for row in sorted([Baseline(name, bits), *others], key=lambda one: one.bits):
        table.add_row(row.name, f"{row.bits:.3f}", style="bold green" if row.name == name else None)
    return table
