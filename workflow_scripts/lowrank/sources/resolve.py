"""From a source of the config to files on this machine."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lowrank.config.sources import PathSource, PypiSource
from lowrank.errors import RankwiseError
from lowrank.sources import archives, local, pypi


@contextmanager
def source_files(source: PypiSource | PathSource, cache: Path) -> Iterator[list[Path]]:
    """Yield the files that a source names, sorted; files of a package are unpacked for the time of the block.

    Raises:
        RankwiseError: see `pypi.download`, `archives.extract` and `local.find_files`.
    """
    if isinstance(source, PathSource):
        yield local.find_files(source)
        return
    archive = pypi.download(source, cache)
    with tempfile.TemporaryDirectory(prefix=".unpacked-", dir=cache) as folder:
        yield archives.extract(archive, source.file, Path(folder))


@contextmanager
def placed(place: str) -> Iterator[None]:
    """Put a YAML path before the message of a `RankwiseError` of the block."""
    try:
        yield
    except RankwiseError as error:
        raise RankwiseError(f"{place}: {error}") from error
