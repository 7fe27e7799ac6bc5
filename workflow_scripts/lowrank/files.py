"""Reading and writing of artefacts: whole or not at all, and never a pickle.

Every writer here puts the content under a temporary name in the same folder and renames it, so that a
reader (or Snakemake) sees either the old file or the finished new one.
"""

from __future__ import annotations

import errno
import glob
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lowrank.errors import RankwiseError

if TYPE_CHECKING:
    import torch

HASH_CHUNK = 1 << 20


@contextmanager
def atomic_path(target: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside `target`; rename it to `target` when the block succeeds.

    Works for files and for folders (a folder that exists already is replaced).

    Raises:
        RankwiseError: the disk is full or the folder cannot be written, with the path and the cure.
    """
    target = Path(target)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(target)
        yield temporary
        _readable_by_others(temporary)
        if temporary.is_dir() and target.is_dir():
            shutil.rmtree(target)
        os.replace(temporary, target)
    except OSError as error:
        raise write_error(target, error) from error
    except Exception as error:
        if "No space left" not in str(error):  # safetensors wraps the system's error in a type of its own
            raise
        raise write_error(target, OSError(errno.ENOSPC, "No space left on device")) from error
    finally:
        if temporary.is_dir():
            shutil.rmtree(temporary, ignore_errors=True)
        else:
            temporary.unlink(missing_ok=True)


def _remove_leftovers(target: Path) -> None:
    """Remove what killed writers of this target left behind; there is one writer of a target at a time."""
    for old in target.parent.glob(f".{glob.escape(target.name)}.*.tmp"):
        if old.is_dir():
            shutil.rmtree(old, ignore_errors=True)
        else:
            old.unlink(missing_ok=True)


def link_or_copy(source: Path, target: Path) -> None:
    """A hard link where the file systems allow it, else a copy."""
    try:
        os.link(source.resolve(), target)  # resolve: the hub's cache holds symbolic links
    except OSError:
        shutil.copyfile(source, target)


def _readable_by_others(path: Path) -> None:
    """Give files the permissions that the user's umask asks for (some writers make them private)."""
    umask = os.umask(0)
    os.umask(umask)
    for file in path.rglob("*") if path.is_dir() else [path]:
        if file.is_file() and file.stat().st_nlink == 1:
            file.chmod(0o666 & ~umask)


def write_error(target: Path, error: OSError) -> RankwiseError:
    """The message for a failed write, by its cause."""
    if error.errno == errno.ENOSPC:
        free = shutil.disk_usage(existing_parent(target)).free / 2**20
        return RankwiseError(
            f"{target}: no space left on the disk ({free:.0f} MiB free). Free some space, or move `results` "
            "and the `cache` of the config to a larger disk; finished results are intact."
        )
    if error.errno in (errno.EACCES, errno.EROFS, errno.EPERM):
        return RankwiseError(f"{target}: cannot be written ({error.strerror}). Check the folder's permissions.")
    return RankwiseError(f"{target}: writing failed: {error}")


def existing_parent(path: Path) -> Path:
    """The nearest folder above `path` that exists."""
    for parent in path.resolve().parents:
        if parent.exists():
            return parent
    return Path("/")


def sha256_file(path: str | Path) -> str:
    """Hex SHA-256 of a file's content."""
    digest = hashlib.sha256()
    with open(path, "rb") as stream:
        while chunk := stream.read(HASH_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def digest_of(value: Any) -> str:
    """Hex SHA-256 of a JSON value, independent of the order of keys."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


def write_text(path: str | Path, text: str) -> None:
    """Write UTF-8 text atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: str | Path, value: Any) -> None:
    """Write a JSON artefact atomically; a number that is not finite is an error, never `NaN` in a file."""
    try:
        text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False)
    except ValueError as error:
        raise RankwiseError(f"{path}: a result is not finite ({error}); nothing was written.") from error
    write_text(path, text + "\n")


def read_json(path: str | Path) -> Any:
    """Read a JSON artefact.

    Raises:
        RankwiseError: the file is missing, empty or no JSON, with its path and what to do.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise RankwiseError(f"{path}: missing. Run the workflow again: it makes what is missing.") from error
    except (OSError, UnicodeDecodeError) as error:
        raise RankwiseError(f"{path}: cannot be read ({error}).") from error
    if not text.strip():
        raise RankwiseError(f"{path}: empty. Delete it and run the workflow again.")
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise RankwiseError(
            f"{path}: damaged, no valid JSON ({error}). Delete it and run the workflow again."
        ) from error


def save_tensors(
    path: str | Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Write tensors as safetensors, atomically.

    Raises:
        RankwiseError: a floating tensor holds a value that is not finite; it is named.
    """
    from safetensors.torch import save_file

    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            raise RankwiseError(f"{path}: tensor {name!r} holds values that are not finite; nothing was written.")
    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    # One entry: safetensors writes several in any order, and equal content must give equal bytes.
    record = {"record": json.dumps(dict(metadata), sort_keys=True)} if metadata else None
    with atomic_path(path) as temporary:
        save_file(contiguous, temporary, metadata=record)


def load_tensors(path: str | Path, device: str = "cpu") -> dict[str, torch.Tensor]:
    """Read a safetensors file.

    Raises:
        RankwiseError: the file is missing or damaged, with its path and what to do.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not Path(path).is_file():
        raise RankwiseError(f"{path}: missing. Run the workflow again: it makes what is missing.")
    try:
        return load_file(str(path), device=device)
    except (SafetensorError, OSError, ValueError) as error:
        raise RankwiseError(
            f"{path}: damaged, no readable safetensors file ({error}). Delete it and run the workflow again."
        ) from error


def layer_name(layer: int) -> str:
    """Name of the file of one block."""
    return f"layer_{layer:03d}.safetensors"


def layer_files(folder: str | Path, layers: int) -> list[Path]:
    """The files of all blocks of a model, in order.

    Raises:
        RankwiseError: a file is missing, with its path and what to do.
    """
    files = [Path(folder) / layer_name(layer) for layer in range(layers)]
    for file in files:
        if not file.is_file():
            raise RankwiseError(f"{file}: missing. Delete {folder} and run the workflow again.")
    return files
