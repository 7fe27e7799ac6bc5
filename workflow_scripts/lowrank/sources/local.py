"""Sources on this machine: files, folders, and files of token ids."""

from __future__ import annotations

import zipfile
from pathlib import Path

import numpy as np
import numpy.typing as npt

from lowrank.config.sources import PathSource, TokensSource
from lowrank.errors import RankwiseError
from lowrank.files import matching_files


def find_files(source: PathSource) -> list[Path]:
    """The files that a `path:` source names, sorted: the file, or those of a folder (not of its subfolders).

    Raises:
        RankwiseError: the path does not exist, or no file of the folder matches `file:`.
    """
    path = Path(source.path).expanduser()
    if not path.exists():
        raise RankwiseError(
            f"path: {source.path}: there is no such file or folder (seen from {Path.cwd()}). Correct the path."
        )
    if path.is_file():
        return [path]
    pattern = source.file or "*"
    files = matching_files(path, source.file)
    if not files:
        raise RankwiseError(f"path: {source.path}: no file of this folder matches `file: {pattern}`.")
    return files


def read_tokens(source: TokensSource) -> npt.NDArray[np.int32]:
    """The token ids of a `tokens:` source, n x length.

    Raises:
        RankwiseError: no such file, not readable, or `tokens` is not one integer array of two dimensions with
            ids from 0 to 2^31 - 1.
    """
    path = Path(source.tokens).expanduser()
    if not path.is_file():
        raise RankwiseError(f"tokens: {source.tokens}: there is no such file (seen from {Path.cwd()}). Correct it.")
    arrays = _read_arrays(path)
    if "tokens" not in arrays:
        names = ", ".join(sorted(arrays)) or "nothing"
        raise RankwiseError(f"{path}: has no array `tokens`, but {names}. Save the ids under the name `tokens`.")
    tokens = arrays["tokens"]
    if tokens.ndim != 2 or not np.issubdtype(tokens.dtype, np.integer) or tokens.size == 0:
        raise RankwiseError(
            f"{path}: `tokens` is {tokens.dtype} of shape {tokens.shape}; it must be integers, windows x length."
        )
    low, high = int(tokens.min()), int(tokens.max())
    if low < 0 or high > np.iinfo(np.int32).max:
        raise RankwiseError(f"{path}: `tokens` holds ids from {low} to {high}; ids are at least 0 and fit in 32 bits.")
    return tokens.astype(np.int32)


def _read_arrays(path: Path) -> dict[str, npt.NDArray[np.generic]]:
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        if path.suffix == ".safetensors":
            return dict(load_file(path))
        if path.suffix == ".npz":
            with np.load(path, allow_pickle=False) as arrays:
                return {name: arrays[name] for name in arrays.files}
    except (SafetensorError, zipfile.BadZipFile, OSError, ValueError, EOFError, KeyError) as error:
        raise RankwiseError(f"{path}: cannot be read as {path.suffix} ({error}). Make the file again.") from error
    raise RankwiseError(f"{path}: a `tokens:` source is a .safetensors or .npz file.")
