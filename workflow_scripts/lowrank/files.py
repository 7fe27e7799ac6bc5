"""Reading and writing of artefacts: whole or not at all, checked when read, and never a pickle.

Every writer here puts the content under a temporary name in the same folder and renames it, so that a
reader (or Snakemake) sees either the old file or the finished new one. Tensors carry a checksum of their own, so that
damage is met where a file is first read.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import zlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lowrank.errors import RankwiseError

if TYPE_CHECKING:
    import torch

HASH_CHUNK = 1 << 20
LEGAL_FILES = ("LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*")
"""What says under which terms a model may be used; it goes where the weights go."""
OF_A_MODEL = ("*.safetensors", "*.gguf", "*.json", "*.model", "*.txt", "*.jinja", *LEGAL_FILES)
"""What a model's folder is fetched for; whatever else lies there decides nothing."""
NO_ROOM = (errno.ENOSPC, errno.EDQUOT)
NOT_ALLOWED = (errno.EACCES, errno.EROFS, errno.EPERM)


@contextmanager
def atomic_path(target: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside `target`; rename it to `target` when the block succeeds.

    Works for files and for folders (a folder that exists already is replaced).

    Raises:
        RankwiseError: the disk is full or the folder cannot be written, with the path and the cure.
    """
    target = Path(target)
    # A folder of its own: libraries leave temporary files of their own beside what they write when they are killed.
    scratch = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    temporary = scratch / target.name
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(target)
        scratch.mkdir()
        yield temporary
        _readable_by_others(temporary)
        if temporary.is_dir() and target.is_dir():
            shutil.rmtree(target)
        os.replace(temporary, target)
    except OSError as error:
        elsewhere = error.filename and not Path(str(error.filename)).is_relative_to(target.parent)
        if error.errno in NOT_ALLOWED and error.errno != errno.EROFS and elsewhere:  # a source that may not be read
            said = f"{error.filename}: not allowed ({error.strerror}). Check its permissions"
            raise RankwiseError(f"{said}; finished results are intact.") from error
        raise write_error(target, error) from error
    except Exception as error:
        problem = disk_error(error)
        if problem is None or (isinstance(error, RankwiseError) and problem.errno in NOT_ALLOWED):
            raise  # the message names what may not be read
        raise write_error(target, problem) from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _remove_leftovers(target: Path) -> None:
    """Remove what killed writers of this target left behind; there is one writer of a target at a time."""
    name = re.compile(rf"\.{re.escape(target.name)}\.\d+\.tmp")  # not of targets whose names only begin so
    for old in (path for path in target.parent.iterdir() if name.fullmatch(path.name)):
        if old.is_dir():
            shutil.rmtree(old, ignore_errors=True)
        else:
            old.unlink(missing_ok=True)


def disk_error(error: BaseException) -> OSError | None:
    """The system's error if a disk was full or might not be written; libraries wrap it in types of their own."""
    current: BaseException | None = error
    while current is not None:
        if isinstance(current, OSError) and current.errno in (*NO_ROOM, *NOT_ALLOWED):
            return current
        for number in (*NO_ROOM, *NOT_ALLOWED):
            if os.strerror(number) in str(current):
                return OSError(number, os.strerror(number))
        current = current.__cause__ or current.__context__
    return None


def matching_files(folder: Path, pattern: str | None) -> list[Path]:
    """The files of a folder that are not hidden and match a pattern of pathlib's, sorted; all without one.

    A file of exactly that name is all, whatever signs of patterns are in it. What is no pattern matches nothing.
    """
    if pattern and not Path(pattern).is_absolute() and (named := folder / pattern).is_file():
        return [named]
    try:
        return sorted(file for file in folder.glob(pattern or "*") if file.is_file() and not file.name.startswith("."))
    except (NotImplementedError, ValueError):  # an absolute path, or `**.jsonl`
        return []


def is_of_a_model(file: str | Path) -> bool:
    """Whether a file of a model's folder, by its name, is one of those that are fetched."""
    return any(fnmatch(Path(file).name, pattern) for pattern in OF_A_MODEL)


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
    if error.errno in NO_ROOM:
        free = shutil.disk_usage(existing_parent(target)).free / 2**20
        return RankwiseError(
            f"{target}: no space left on the disk ({free:.0f} MiB free). Free some space, or move `results` "
            "and the `cache` of the config to a larger disk; finished results are intact."
        )
    if error.errno in NOT_ALLOWED:
        return RankwiseError(
            f"{target}: cannot be written ({error.strerror}). Check the folder's permissions, and that its disk is not "
            "mounted read-only; finished results are intact."
        )
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


class Record(dict[str, Any]):
    """An object of a JSON artefact. A key that is not there is damage of the file, and is told as that."""

    def __init__(self, pairs: Mapping[str, Any] | Iterable[tuple[str, Any]], path: Path = Path("a record")) -> None:
        super().__init__(pairs)  # `dataclasses.asdict` makes a copy without a path
        self.path = path

    def __missing__(self, key: str) -> Any:
        raise RankwiseError(f"{self.path}: damaged, it has no {key!r}. Delete it and run the workflow again.")


def read_json(path: str | Path, objects: Callable[[dict[str, Any]], Any] | None = None) -> Any:
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
        raise RankwiseError(f"{path}: cannot be read ({error}). Delete it and run the workflow again.") from error
    if not text.strip():
        raise RankwiseError(f"{path}: empty. Delete it and run the workflow again.")
    try:
        return json.loads(text, object_hook=objects)
    except (json.JSONDecodeError, RecursionError) as error:
        raise RankwiseError(
            f"{path}: damaged, no valid JSON ({error}). Delete it and run the workflow again."
        ) from error


def read_record(path: str | Path) -> Record:
    """Read a JSON artefact that is an object; it and all objects in it are `Record`s.

    Raises:
        RankwiseError: see `read_json`; or it is no object.
    """
    record = read_json(path, lambda pairs: Record(pairs, Path(path)))
    if not isinstance(record, Record):
        raise RankwiseError(f"{path}: damaged, no JSON object. Delete it and run the workflow again.")
    return record


def described_file(index: str | Path) -> Path:
    """The data file that an index describes, in the folder `data` beside it.

    Raises:
        RankwiseError: one of both is missing or damaged, or the data are not those that the index describes.
    """
    record = read_record(index)
    data = Path(index).parent / "data" / str(record["file"])
    if not data.is_file():
        raise RankwiseError(f"{data}: missing. Run the workflow again: it makes what is missing.")
    if sha256_file(data) != record["sha256"]:
        raise RankwiseError(f"{data}: not the file that {index} describes. Delete both and run the workflow again.")
    return data


def save_tensors(
    path: str | Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Write tensors as safetensors, atomically, with a checksum.

    Raises:
        RankwiseError: a floating tensor holds a value that is not finite; it is named.
    """
    from safetensors.torch import save_file

    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            raise RankwiseError(f"{path}: tensor {name!r} holds values that are not finite; nothing was written.")
    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    # One entry: safetensors writes several in any order, and equal content must give equal bytes.
    record = json.dumps({**(metadata or {}), CHECKSUM: _checksum(contiguous)}, sort_keys=True)
    with atomic_path(path) as temporary:
        save_file(contiguous, temporary, metadata={"record": record})


CHECKSUM = "crc32"


def _checksum(tensors: Mapping[str, torch.Tensor]) -> str:
    """CRC-32 of names, types, shapes and bytes: against damage, not against somebody who means harm."""
    import torch

    value = 0
    for name, tensor in sorted(tensors.items()):
        value = zlib.crc32(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode(), value)
        value = zlib.crc32(tensor.reshape(-1).view(torch.uint8).numpy().data, value)
    return f"{value:08x}"


def load_tensors(
    path: str | Path, names: Collection[str] = (), whole: str | Path | None = None, checked: bool = False
) -> dict[str, torch.Tensor]:
    """Read a safetensors file, and compare its checksum if it has one (files made elsewhere have none).

    Args:
        path: the file.
        names: tensors that it must hold.
        whole: what is made again as a whole, for messages, if not the file alone.
        checked: it has been compared with another checksum, and needs not be with its own.

    Raises:
        RankwiseError: the file is missing or damaged, or lacks a tensor, with its path and what to do.
    """
    from safetensors import SafetensorError, safe_open

    cure = f"Delete {whole or 'it'} and run the workflow again."
    if not Path(path).is_file():
        raise RankwiseError(
            f"{path}: missing. {cure if whole else 'Run the workflow again: it makes what is missing.'}"
        )
    try:
        with safe_open(path, framework="pt") as file:
            record = json.loads((file.metadata() or {}).get("record", "{}"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it cannot be iterated
    except (SafetensorError, OSError, ValueError) as error:
        raise RankwiseError(f"{path}: damaged, no readable safetensors file ({error}). {cure}") from error
    if not checked and CHECKSUM in record and record[CHECKSUM] != _checksum(tensors):
        raise RankwiseError(f"{path}: damaged, its content has not the checksum that it was written with. {cure}")
    require_tensors(path, tensors, names, whole)
    return tensors


def require_tensors(
    path: str | Path, tensors: Collection[str], names: Collection[str], whole: str | Path | None = None
) -> None:
    """See that a file holds some tensors; arguments as of `load_tensors`, `whole` of a block's file its folder.

    Raises:
        RankwiseError: it lacks one.
    """
    if missing := [name for name in names if name not in tensors]:
        raise RankwiseError(
            f"{path}: holds no {', '.join(map(repr, missing))}: it was made for something else. "
            f"Delete {whole or 'it'} and run the workflow again."
        )


def read_metadata(path: str | Path) -> dict[str, Any]:
    """What a file that `load_tensors` reads says of itself: the metadata that it was written with."""
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        record: dict[str, Any] = json.loads((file.metadata() or {}).get("record", "{}"))
    return record


def peek_tensors(path: Path, names: Collection[str]) -> dict[str, torch.Tensor]:
    """Some tensors of a block's file, without the others: what it says of itself, before all of it is read and checked.

    Raises:
        RankwiseError: the file is damaged, or lacks one of them.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in names}
    except (SafetensorError, OSError) as error:
        raise RankwiseError(
            f"{path}: damaged, or made for something else ({error}). Delete {path.parent} and run the workflow again."
        ) from error


def layer_name(layer: int) -> str:
    """Name of the file of one block."""
    return f"layer_{layer:03d}.safetensors"


def publish_layers(state: Path, target: str | Path) -> None:
    """Put the layer files of unfinished work, which is now finished, into their place, all or none.

    They stay in `state` too: it must outlive a kill before the job's end.
    """
    with atomic_path(target) as folder:
        folder.mkdir()
        for file in sorted(state.glob("layer_*.safetensors")):
            link_or_copy(file, folder / file.name)


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
