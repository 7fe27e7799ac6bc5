"""A finished run, built once for each file of tests."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.survival.workshop import build


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("workshop")
    build(root)
    return root


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """A copy of the finished run that a test may spoil."""
    return Path(shutil.copytree(finished / "run", tmp_path / "results/run"))
