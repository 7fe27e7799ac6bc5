"""Which file is the manifest of a folder, and what it says of damage."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lowrank import files, manifest
from lowrank.errors import RankwiseError
from lowrank.files import save_tensors, write_json
from lowrank.manifest import check_manifest, checksums_of, load_layer, manifest_of

STRANGERS = ["[1, 2]", "{}", '{"files": ["a.txt"]}', '{"files": {"main.js": "/static/main.3b1c.js"}}', "{cut off", ""]


@pytest.mark.parametrize("content", STRANGERS)
@pytest.mark.parametrize(
    ("place", "name"),
    [("models/m", "manifest.json"), ("models/m", "m.json"), ("results/try/checkpoint", "manifest.json")],
)
def test_beside_a_copied_checkpoint_a_file_of_somebody_else_is_no_manifest(
    place: str, name: str, content: str, tmp_path: Path
) -> None:
    folder = tmp_path / place
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    folder.with_name(name).write_text(content)
    assert manifest_of(folder) is None
    check_manifest(folder, "files")
    write_json(folder.with_name(name), {"files": checksums_of(folder)})
    assert manifest_of(folder) == folder.with_name(name)
    (folder / "config.json").write_text("[]")
    with pytest.raises(RankwiseError, match="damaged or replaced"):
        check_manifest(folder, "files")


@pytest.mark.parametrize("content", STRANGERS)
@pytest.mark.parametrize(
    ("inside", "name"),
    [
        ("models/m", "m.json"),
        ("tasks/piqa", "piqa.json"),
        ("statistics/m/c/layers", "manifest.json"),
        ("compressed/m/svd/20/seed0/checkpoint", "manifest.json"),
    ],
)
def test_in_a_run_it_is_a_damaged_one(inside: str, name: str, content: str, tmp_path: Path) -> None:
    """Where `results` is a link, too."""
    (tmp_path / "disk/run" / inside).mkdir(parents=True)
    (tmp_path / "results").symlink_to("disk")
    (tmp_path / "disk/run" / inside).with_name(name).write_text(content)
    with pytest.raises(RankwiseError, match=rf"{name}.* run the workflow again"):
        check_manifest(tmp_path / "results/run" / inside, "files")


def test_what_lies_beside_manifests_of_a_run_is_none(tmp_path: Path) -> None:
    for place in ("results/run/models/mine", "results/run/compressed/m/svd/20/seed0/elsewhere"):
        folder = tmp_path / place
        folder.mkdir(parents=True)
        folder.with_name("manifest.json").write_text("{}")
        folder.with_name(f"{folder.name}s.json").write_text("{}")
        assert manifest_of(folder) is None


@pytest.mark.parametrize("linked", ["into a run", "out of a run"])
def test_a_link_is_in_a_run_where_it_lies_or_where_it_leads(linked: str, tmp_path: Path) -> None:
    inside, outside = tmp_path / "results/run/models/m", tmp_path / "elsewhere/m"
    link, folder = (outside, inside) if linked == "into a run" else (inside, outside)
    folder.mkdir(parents=True)
    link.parent.mkdir(parents=True)
    link.symlink_to(folder)
    folder.with_name("m.json").write_text("{}")
    assert manifest_of(link) == (folder.with_name("m.json") if folder == inside else None)


def test_a_file_that_lists_none_is_no_manifest(tmp_path: Path) -> None:
    (tmp_path / "checkpoint").mkdir()
    (tmp_path / "manifest.json").write_text('{"files": {}}')
    assert manifest_of(tmp_path / "checkpoint") is None


def test_a_blocks_file_is_hashed_once_when_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By its manifest, or without one by what it was written with."""
    hashed: list[str] = []
    for module, name in ((files, "_checksum"), (manifest, "sha256_file")):
        whole = getattr(module, name)
        monkeypatch.setattr(module, name, lambda given, name=name, whole=whole: hashed.append(name) or whole(given))
    layers = tmp_path / "layers"
    file, tensors = layers / "layer_000.safetensors", {"a": torch.arange(3.0)}
    save_tensors(file, tensors)
    hashed.clear()
    assert load_layer(file)["a"].equal(tensors["a"])
    assert hashed == ["_checksum"]
    write_json(tmp_path / "manifest.json", {"layers": checksums_of(layers)})
    hashed.clear()
    assert load_layer(file)["a"].equal(tensors["a"])
    assert hashed == ["sha256_file"]
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(RankwiseError, match="damaged or replaced"):
        load_layer(file)


def test_of_several_files_the_damaged_one_is_named(tmp_path: Path) -> None:
    layers = tmp_path / "layers"
    layers.mkdir()
    for number in range(9):
        (layers / f"{number}.bin").write_bytes(bytes([number]) * 1000)
    stated = checksums_of(layers)
    assert len(set(stated.values())) == 9
    write_json(tmp_path / "manifest.json", {"layers": stated})
    assert check_manifest(layers, "layers")
    (layers / "5.bin").write_bytes(b"")
    with pytest.raises(RankwiseError, match=r"5\.bin: damaged or replaced"):
        check_manifest(layers, "layers")
    (layers / "7.bin").unlink()
    with pytest.raises(RankwiseError, match=r"7\.bin: missing, and .*manifest\.json lists it"):
        check_manifest(layers, "layers")
