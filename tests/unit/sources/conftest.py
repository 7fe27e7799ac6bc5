"""Models that tests of this folder fetch."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.unit.model.gguf_samples import write_gguf
from tests.unit.sources.model_samples import save_llama


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small random Llama with grouped-query attention and tied embeddings, in bfloat16."""
    folder = tmp_path_factory.mktemp("original")
    save_llama(folder)
    return folder


@pytest.fixture
def folder(original: Path, tmp_path: Path) -> Path:
    """A copy that a test may spoil."""
    return Path(shutil.copytree(original, tmp_path / "source"))


@pytest.fixture(scope="module")
def gguf_file(original: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model as a float32 GGUF file, written by llama.cpp's own library."""
    file = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    write_gguf(file, original, load_file(original / "model.safetensors"))
    return file
