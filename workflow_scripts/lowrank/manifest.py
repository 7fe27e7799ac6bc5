"""Manifests: what lies in a folder, file by file, in a JSON beside it; damage is met where a file is first read."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

from lowrank.errors import RankwiseError
from lowrank.files import load_tensors, read_record, sha256_file

if TYPE_CHECKING:
    import torch

SECTIONS = ("files", "layers", "sha256")
"""Keys of manifests under which names of files have their SHA-256."""
HASHED_AT_ONCE = 4
"""Files, in threads: hashing holds no lock of Python's."""
KINDS = ("models", "tasks", "statistics", "gradients", "bases", "neurons", "compressed", "tuned")
"""Folders of a run in which there are manifests."""


def checksums_of(folder: str | Path) -> dict[str, str]:
    """Name -> checksum of each file of a folder, for its manifest."""
    return _sha256([path for path in sorted(Path(folder).iterdir()) if path.is_file()])


def _sha256(files: Sequence[Path]) -> dict[str, str]:
    """Name -> checksum of files, a few at a time."""
    with ThreadPoolExecutor(HASHED_AT_ONCE) as pool:
        return dict(zip((file.name for file in files), pool.map(sha256_file, files), strict=True))


def load_layer(file: Path, names: Collection[str] = ()) -> dict[str, torch.Tensor]:
    """The tensors of one block, of a file that is hashed once: as the manifest beside its folder says, or as it does.

    Raises:
        RankwiseError: see `load_tensors`; or the file is not the one that the manifest beside its folder describes.
    """
    checked = file.is_file() and check_manifest(file.parent, "layers", [file.name])
    return load_tensors(file, names, file.parent, checked=checked)


def check_manifest(folder: Path, section: str, names: Collection[str] = (), skip: tuple[str, ...] = ()) -> bool:
    """Compare files of a folder with the manifest beside it: `<folder>.json`, or `manifest.json` in the same place.

    A folder without a manifest is not checked: one that is being made, or a checkpoint that was copied elsewhere, where
    a `manifest.json` may be somebody else's.

    Args:
        folder: whose files.
        section: key of the manifest that maps names of files to their SHA-256.
        names: the files; none: all that the manifest lists.
        skip: without those whose names end so.

    Returns:
        Whether there is a manifest.

    Raises:
        RankwiseError: a file is missing, or it is not the one that the manifest describes.
    """
    manifest = manifest_of(folder)
    if manifest is None:
        return False
    stated = read_record(manifest)[section]
    if not isinstance(stated, dict):
        raise RankwiseError(f"{manifest}: damaged, {section!r} lists no files. Delete it and run the workflow again.")
    cure = f"Delete the folder {folder} and run the workflow again."
    files = [folder / name for name in names or [name for name in stated if not name.endswith(skip)]]
    for file in files:
        if not file.is_file():
            raise RankwiseError(f"{file}: missing, and {manifest} lists it. {cure}")
    for name, checksum in _sha256(files).items():
        if checksum != stated.get(name):
            raise RankwiseError(f"{folder / name}: damaged or replaced: not the file that {manifest} describes. {cure}")
    return True


def manifest_of(folder: Path) -> Path | None:
    """The manifest of a folder, which lies beside it, not beside a link to it; None if there is none.

    In its place in a run, a file of that name is one, however damaged. Elsewhere it is if it lists checksums of files.
    """
    real = folder.resolve()
    in_a_run = any(_in_a_run(path) for path in (folder.absolute(), real))  # which may be a link to a larger disk
    places = {
        real.with_name(f"{real.name}.json"): real.parent.name in ("models", "tasks"),
        real.with_name("manifest.json"): real.name in ("checkpoint", "layers"),
    }
    found = (file for file, ours in places.items() if file.is_file() and ((in_a_run and ours) or _lists_files(file)))
    return next(found, None)


def _in_a_run(path: Path) -> bool:
    """Whether a path is one of a run: `results/<run>/<kind>/...`."""
    above = zip(path.parts, path.parts[2:], strict=False)
    return any(first == "results" and third in KINDS for first, third in above)


def _lists_files(file: Path) -> bool:
    """Whether a file holds what manifests do: names of files, each with its SHA-256."""
    try:
        record = read_record(file)
    except RankwiseError:
        return False
    digest = re.compile("[0-9a-f]{64}")
    listed = [names for section in SECTIONS if isinstance(names := record.get(section), dict)]
    return any(names and all(digest.fullmatch(str(stated)) for stated in names.values()) for names in listed)
