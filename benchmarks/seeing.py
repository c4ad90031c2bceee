"""What it costs to see: a guard over training, a diagnosis, and a page of a thousand copies in a browser."""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

import unrolled as ur
from benchmarks.timing import Target, in_turn

__all__ = ["targets"]

SHAPES = [(100, 32, 128, 128), (784, 64, 1, 128), (100, 32, 256, 256)]
"""(T, B, I, H)."""

# Chromium as root, without what it would ask the network for.
FLAGS = ["--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking", "--disable-sync"]


def _training(rnn: ur.Unrolled, inputs: Tensor) -> Callable[[], object]:
    optimizer = torch.optim.Adam(rnn.parameters(), lr=0.0)

    def step() -> None:
        optimizer.zero_grad()
        rnn(inputs)[0].square().mean().backward()
        optimizer.step()

    return step


def targets() -> Iterator[Target]:
    """A training step with a guard over one without; a page's size and first paint."""
    for T, B, I, H in SHAPES:
        plain, guarded, inputs = ur.unroll(ur.LSTMCell(I, H)), ur.unroll(ur.LSTMCell(I, H)), torch.randn(T, B, I)
        with ur.guard(guarded):
            a, b = in_turn(_training(guarded, inputs), _training(plain, inputs), rounds=41)
        yield Target(f"LSTM {(T, B, I, H)}: a training step under guard / without", a / b, 1.03)
    yield from _page()


def _loss(outputs: Tensor, state: object) -> Tensor:
    return outputs.square().mean()


def _page() -> Iterator[Target]:
    rnn, inputs = ur.unroll(ur.LSTMCell(32, 64)), torch.randn(1000, 8, 32)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "page.html")
        ur.draw(rnn, inputs, path, loss=_loss)
        started = time.perf_counter()
        ur.draw(rnn, inputs, path, loss=_loss)
        took = time.perf_counter() - started
        yield Target("a page of 1,000 copies, LSTM (B = 8, I = 32, H = 64): seconds to draw", took, None)
        yield Target("the same: megabytes", path.stat().st_size / 1e6, 3.0)
        if shutil.which("chromium"):
            yield Target("the same: seconds to the first paint, Debian's chromium", _first_paint(path), 1.0)


def _first_paint(path: Path) -> float:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=FLAGS)
        times = []
        for _ in range(5):
            page = browser.new_page()
            page.goto(path.as_uri())
            page.wait_for_timeout(500)
            times.append(page.evaluate("performance.getEntriesByName('first-contentful-paint')[0].startTime"))
            page.close()
        browser.close()
    return sorted(times)[2] / 1000
