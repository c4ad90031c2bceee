"""Makes the pictures of docs/unrolling.md: python docs/make_pictures.py."""

from __future__ import annotations

from pathlib import Path

import torch

import unrolled as ur

HERE = Path(__file__).parent


def main() -> None:
    """Draw them all into this folder."""
    torch.manual_seed(0)
    inputs = torch.randn(100, 8, 16)
    for kind in (ur.RNNCell, ur.LSTMCell, ur.GRUCell):
        target = HERE / f"lag-{kind.__name__}.svg"
        ur.draw(ur.unroll(kind(16, 32)), inputs, target, loss=lambda outputs, state: outputs[-1].sum(), chart="lag")
    ur.draw(ur.unroll(ur.LSTMCell(16, 32)), torch.randn(1000, 8, 16), HERE / "memory.svg", chart="memory")


if __name__ == "__main__":
    main()
