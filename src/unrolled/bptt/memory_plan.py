"""Memory against time for the schedules of a call, as text."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from unrolled.bptt.planning import Option, format_bytes
from unrolled.results import Result

_WIDTH, _HEIGHT = 56, 10


@dataclass(frozen=True)
class MemoryPlan(Result):
    """Memory against time for the schedules of one call; `print` it.

    Attributes:
        network: its name.
        T: steps.
        B: batch size.
        options: the fastest schedule for each budget, from full storage down, and the chosen one.
        chosen: what the network goes by.
        inputs: bytes of the inputs; their gradient, if one is asked for, takes as much again, under any schedule.
        outputs: bytes of the outputs; likewise.

    Example:
        >>> import torch, unrolled as ur
        >>> plan = ur.plan_memory(ur.unroll(ur.GRUCell(3, 4), memory=0.3), torch.randn(300, 2, 3))
        >>> plan.to_dict()["options"][0]["schedule"], "●" in str(plan)
        ('store_all', True)
    """

    network: str
    T: int
    B: int
    options: tuple[Option, ...]
    chosen: Option
    inputs: int
    outputs: int

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers and text, as JSON takes them."""
        full = self.options[0].bytes
        options = [
            {
                "schedule": option.name,
                "bytes": round(option.bytes),
                "share": option.bytes / full,
                "extra_steps": option.schedule.extra_advances,
                "time_ratio": option.ratio,
                "chosen": option is self.chosen or option == self.chosen,
            }
            for option in self.options
        ]
        uncounted = {"inputs": self.inputs, "outputs": self.outputs}
        return {"network": self.network, "T": self.T, "B": self.B, "options": options, "apart": uncounted}

    def __str__(self) -> str:
        head = f"{self.network}, T = {self.T:,}, B = {self.B}: activation memory against time"
        uncounted = (
            f"apart from this: inputs {format_bytes(self.inputs)}, outputs {format_bytes(self.outputs)}, "
            "and their gradients as much again"
        )
        return "\n".join([head, "", *self._table(), "", *self._picture(), "", uncounted])

    def _table(self) -> list[str]:
        full = self.options[0].bytes or 1.0
        rows = [("schedule", "memory", "of full", "steps run twice or more", "time")]
        rows += [
            (
                f"{'>' if option == self.chosen else ' '} {option.name}",
                format_bytes(option.bytes),
                f"{option.bytes / full:.1%}",
                f"{option.schedule.extra_advances:,}",
                f"x {option.ratio:.2f}",
            )
            for option in self.options
        ]
        rows[0] = (f"  {rows[0][0]}", *rows[0][1:])
        widths = [max(len(row[column]) for row in rows) for column in range(5)]
        return [
            "  ".join([row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True))])
            for row in rows
        ]

    def _picture(self) -> list[str]:
        """Time upwards, memory to the right on a logarithmic scale; the chosen schedule is a full dot."""
        slowest = max(option.ratio for option in self.options)
        low, high = (math.log(max(f(o.bytes for o in self.options), 1.0)) for f in (min, max))
        field = [[" "] * (_WIDTH + 1) for _ in range(_HEIGHT + 1)]
        for option in sorted(self.options, key=lambda o: o == self.chosen):
            x = round((math.log(max(option.bytes, 1.0)) - low) / ((high - low) or 1.0) * _WIDTH)
            y = round((option.ratio - 1) / ((slowest - 1) or 1.0) * _HEIGHT)
            field[_HEIGHT - y][x] = "●" if option == self.chosen else "○"
        labels = [f"x {slowest:.2f}", *[""] * (_HEIGHT - 1), "x 1.00"]
        margin = max(map(len, labels))
        lines = [f"{label:>{margin}} ┤{''.join(row).rstrip()}" for label, row in zip(labels, field, strict=True)]
        least, most = (format_bytes(f(o.bytes for o in self.options)) for f in (min, max))
        axis = " " * margin + " └" + "─" * (_WIDTH + 1)
        return ["time", *lines, axis, " " * (margin + 2) + least + most.rjust(_WIDTH + 1 - len(least)) + "  memory"]
