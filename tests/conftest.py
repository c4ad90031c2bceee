"""What every test starts from: the same random numbers, and one thread per worker."""

from __future__ import annotations

import os

import pytest
import torch
from hypothesis import settings

# `make processors` also asks for two: what a call takes in memory and how it rounds must not depend on it.
torch.set_num_threads(int(os.environ.get("UNROLLED_THREADS", "1")))

# A test asserts numbers, never how long it takes: the first example of a cell may wait for the compiler.
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--regenerate", action="store_true", help="write golden files anew instead of comparing with them")


@pytest.fixture
def regenerate(request: pytest.FixtureRequest) -> bool:
    return request.config.getoption("--regenerate")


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)
