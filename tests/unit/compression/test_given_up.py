"""A checkpoint that was given up and is made again has the manifest that it had."""

from __future__ import annotations

import errno
import shutil
from pathlib import Path
from typing import Any

import pytest

from lowrank.compression import given_up
from lowrank.compression.given_up import KEPT, give_up, write_manifest
from lowrank.errors import RankwiseError

MANIFEST: dict[str, Any] = {
    "ranks": {"a": 3}, "kept": 0.8123456789012345, "files": {"x": "ab"}, "pair": (1, 2),
    "seconds": 3.5, "environment": {"threads": 1},
}  # fmt: skip
LATER = MANIFEST | {"seconds": 4.5, "environment": {"threads": 2}}


def made(folder: Path, manifest: dict[str, Any]) -> bytes:
    """A checkpoint and its manifest, whose bytes are returned."""
    (folder / "checkpoint").mkdir(parents=True)
    (folder / "checkpoint/model.safetensors").write_bytes(b"weights")
    write_manifest(folder / "manifest.json", manifest)
    return (folder / "manifest.json").read_bytes()


def test_the_folder_goes_and_the_manifest_stays(tmp_path: Path) -> None:
    before = made(tmp_path, MANIFEST)
    give_up(tmp_path, tmp_path / KEPT)
    assert sorted(path.name for path in tmp_path.iterdir()) == [KEPT, "manifest.json"]
    assert (tmp_path / "manifest.json").read_bytes() == (tmp_path / KEPT).read_bytes() == before


@pytest.mark.parametrize(
    ("manifest", "same"),
    [
        (LATER, True),
        (LATER | {"base": {"bytes": 3, "license": "MIT"}}, True),  # which older manifests lack
        (LATER | {"files": {"x": "ac"}}, False),
        (LATER | {"training": {"steps": 3, "seconds": 9.5, "processes": 2}}, True),
        (LATER | {"training": {"steps": 4, "seconds": 1.5, "processes": 1}}, False),
    ],
)
def test_the_same_checkpoint_has_the_same_manifest_again_and_no_other_has(
    tmp_path: Path, manifest: dict[str, Any], same: bool
) -> None:
    trained = {"training": {"steps": 3, "seconds": 1.5, "processes": 1}} if "training" in manifest else {}
    before = made(tmp_path, MANIFEST | trained)
    give_up(tmp_path, tmp_path / KEPT)
    (tmp_path / "manifest.json").unlink()  # as Snakemake does before it makes it again
    assert (made(tmp_path, manifest) == before) is same


def test_without_a_manifest_nothing_is_deleted(tmp_path: Path) -> None:
    made(tmp_path, MANIFEST)
    (tmp_path / "manifest.json").write_text("")
    with pytest.raises(RankwiseError, match=r"manifest\.json: empty"):
        give_up(tmp_path, tmp_path / KEPT)
    assert (tmp_path / "checkpoint/model.safetensors").is_file()


def test_what_is_made_again_can_be_given_up_again(tmp_path: Path) -> None:
    """What says that it was given up is gone, as long as it is there."""
    before = made(tmp_path, MANIFEST)
    for _ in range(2):
        give_up(tmp_path, tmp_path / KEPT)
        assert made(tmp_path, LATER) == before
        assert not (tmp_path / KEPT).exists()


@pytest.mark.parametrize("writes", [0, 1, 2])
def test_a_kill_while_the_manifest_is_written_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, writes: int
) -> None:
    """Before any of its writes, or after the last; Snakemake deletes what an unfinished job has made."""
    before = made(tmp_path, MANIFEST)
    give_up(tmp_path, tmp_path / KEPT)
    done = 0
    write = given_up.write_json

    def killed(path: Path, value: dict[str, Any]) -> None:
        nonlocal done
        if done == writes:
            raise KeyboardInterrupt
        done += 1
        write(path, value)

    with monkeypatch.context() as patch:
        patch.setattr(given_up, "write_json", killed)
        try:
            made(tmp_path, LATER)
        except KeyboardInterrupt:
            assert writes < 2
    shutil.rmtree(tmp_path / "checkpoint")
    (tmp_path / "manifest.json").unlink(missing_ok=True)
    assert made(tmp_path, LATER) == before


def test_a_deletion_that_fails_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made(tmp_path, MANIFEST)

    def refused(path: str, **_: Any) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    with monkeypatch.context() as patch:
        patch.setattr("os.rmdir", refused)
        with pytest.raises(PermissionError):
            give_up(tmp_path, tmp_path / KEPT)
    give_up(tmp_path, tmp_path / KEPT)
    assert not (tmp_path / "checkpoint").exists()
    give_up(tmp_path, tmp_path / KEPT)  # a folder that is not there is none to delete
