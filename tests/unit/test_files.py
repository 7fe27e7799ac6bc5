"""Writing is whole or not at all; reading says what is wrong."""

import dataclasses
import errno
import os
import re
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError

from lowrank.errors import RankwiseError
from lowrank.files import (
    atomic_path,
    digest_of,
    layer_files,
    load_tensors,
    matching_files,
    read_json,
    save_tensors,
    sha256_file,
    write_json,
)


def test_a_failure_leaves_the_old_file_and_no_other(tmp_path: Path) -> None:
    target = tmp_path / "result.json"
    write_json(target, {"a": 1})

    def fail() -> None:
        with atomic_path(target) as temporary:
            temporary.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert read_json(target) == {"a": 1}
    assert os.listdir(tmp_path) == ["result.json"]


def test_a_full_disk_is_named_with_the_cure(tmp_path: Path) -> None:
    def fail() -> None:
        with atomic_path(tmp_path / "big.safetensors"):
            raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(
        RankwiseError, match=r"big.safetensors: no space left on the disk .* finished results are intact"
    ):
        fail()


def test_a_number_that_is_not_finite_is_never_written(tmp_path: Path) -> None:
    with pytest.raises(RankwiseError, match="not finite"):
        write_json(tmp_path / "a.json", {"loss": float("nan")})
    with pytest.raises(RankwiseError, match="tensor 'w' holds values that are not finite"):
        save_tensors(tmp_path / "a.safetensors", {"w": torch.tensor([1.0, float("inf")])})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("content", "message"), [(b"", "empty"), (b"{", "damaged, no valid JSON"), (b"\xff\xfe", "cannot be read")]
)
def test_damaged_json_is_named(content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(content)
    with pytest.raises(RankwiseError, match=f"a.json: {message}"):
        read_json(path)
    path.unlink()
    with pytest.raises(RankwiseError, match=r"a.json: missing. Run the workflow again"):
        read_json(path)


@pytest.mark.parametrize("keep", [0, 4, 40])
def test_truncated_tensors_are_named(keep: int, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_tensors(path, {"w": torch.arange(100.0)})
    assert torch.equal(load_tensors(path)["w"], torch.arange(100.0))
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(RankwiseError, match=r"a.safetensors: damaged"):
        load_tensors(path)


def test_a_missing_layer_is_named(tmp_path: Path) -> None:
    (tmp_path / "layer_000.safetensors").touch()
    with pytest.raises(RankwiseError, match=r"layer_001.safetensors: missing. Delete"):
        layer_files(tmp_path, 2)


def test_digests_depend_on_content_and_not_on_order(tmp_path: Path) -> None:
    assert digest_of({"a": 1, "b": [2]}) == digest_of({"b": [2], "a": 1})
    assert digest_of({"a": 1, "b": 2}) != digest_of({"a": 2, "b": 1})
    (tmp_path / "x").write_bytes(b"abc")
    assert sha256_file(tmp_path / "x") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_files_have_the_permissions_of_the_umask(tmp_path: Path) -> None:
    save_tensors(tmp_path / "a.safetensors", {"w": torch.ones(2)})
    umask = os.umask(0)
    os.umask(umask)
    assert (tmp_path / "a.safetensors").stat().st_mode & 0o777 == 0o666 & ~umask


def test_what_a_killed_writer_left_is_removed_by_the_next(tmp_path: Path) -> None:
    leftover = tmp_path / ".layers.1.tmp"
    leftover.mkdir()
    (leftover / "half").touch()
    (tmp_path / ".other.1.tmp").touch()
    with atomic_path(tmp_path / "layers") as folder:
        folder.mkdir()
    assert sorted(os.listdir(tmp_path)) == [".other.1.tmp", "layers"]


def test_equal_tensors_and_records_give_equal_bytes(tmp_path: Path) -> None:
    record = {name: name for name in ("model", "corpus", "seed", "sha256", "other")}
    for index in range(8):
        save_tensors(tmp_path / str(index), {"b": torch.ones(2), "a": torch.zeros(1)}, record)
    assert len({sha256_file(tmp_path / str(index)) for index in range(8)}) == 1


def test_a_full_disk_is_recognised_in_the_error_of_a_library(tmp_path: Path) -> None:
    def fail() -> None:
        with atomic_path(tmp_path / "model"):
            raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    with pytest.raises(RankwiseError, match="no space left on the disk"):
        fail()


def test_a_dataclass_that_holds_a_record_can_be_written(tmp_path: Path) -> None:
    """As post-training does, with its settings: `asdict` copies every dict by its type."""

    @dataclasses.dataclass
    class Work:
        settings: dict[str, object]

    write_json(tmp_path / "a.json", {"rank": 4, "inner": {"rate": 0.5}})
    copy = dataclasses.asdict(Work(read_json(tmp_path / "a.json")))
    assert copy == {"settings": {"rank": 4, "inner": {"rate": 0.5}}}


def test_a_writer_leaves_alone_what_another_writes_whose_name_begins_as_its_own(tmp_path: Path) -> None:
    with atomic_path(tmp_path / "llama-3.1-8b") as theirs:
        theirs.mkdir()
        with atomic_path(tmp_path / "llama-3") as ours:
            ours.mkdir()
        assert theirs.is_dir()
    assert {path.name for path in tmp_path.iterdir()} == {"llama-3", "llama-3.1-8b"}


def test_what_may_not_be_read_is_named_and_not_what_is_written(tmp_path: Path) -> None:
    secret = tmp_path / "elsewhere/secret.txt"
    refused = PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(secret))
    said = r"^/.*secret\.txt: not allowed \(Permission denied\)"
    with pytest.raises(RankwiseError, match=said), atomic_path(tmp_path / "results/corpus"):
        raise refused
    said = f"{secret}: cannot be read ({os.strerror(errno.EACCES)})"
    with pytest.raises(RankwiseError, match="^" + re.escape(said) + "$"), atomic_path(tmp_path / "results/corpus"):
        raise RankwiseError(said) from refused
    ours = PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(tmp_path / "results/.corpus.1.tmp"))
    said = "results/corpus: cannot be written"
    with pytest.raises(RankwiseError, match=said), atomic_path(tmp_path / "results/corpus"):
        raise ours


@pytest.mark.parametrize(
    ("pattern", "found"),
    [
        (None, ["a[1].txt", "a1.txt", "b.csv"]),
        ("*.txt", ["a[1].txt", "a1.txt"]),
        ("a[1].txt", ["a[1].txt"]),
        ("a[12].txt", ["a1.txt"]),
        ("**.txt", []),
        ("/etc/passwd", []),
    ],
)
def test_files_of_a_folder(pattern: str | None, found: list[str], tmp_path: Path) -> None:
    for name in ("a1.txt", "a[1].txt", "b.csv", ".hidden.txt"):
        (tmp_path / name).touch()
    assert sorted(file.name for file in matching_files(tmp_path, pattern)) == sorted(found)
