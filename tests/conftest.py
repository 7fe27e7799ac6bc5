"""What tests of several folders share."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from tests.warm import Warm


@pytest.fixture(scope="session")
def warm() -> Iterator[Warm]:
    """A process that has loaded what stages load, and runs Snakemake."""
    started = Warm()
    yield started
    started.close()


@pytest.fixture(autouse=True)
def environment_of_the_tests() -> Iterator[None]:
    """Stages set variables for a process of their own; the next test finds none of them."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)
