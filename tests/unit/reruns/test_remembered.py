"""Fingerprints are found anew if any file of the code has changed, and only then; no result depends on the memory."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from lowrank.reruns import fingerprint
from lowrank.reruns.fingerprint import Code
from lowrank.reruns.remembered import Found, Remembered


@pytest.fixture(autouse=True)
def python_keeps_caches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.dont_write_bytecode", False)


@pytest.fixture
def scripts(tmp_path: Path) -> Path:
    """Code of two stages."""
    files = {
        "stages/search.py": "from lowrank.shared import f\n\nf(1)\n",
        "stages/table.py": "import pandas\n\npandas.DataFrame()\n",
        "lowrank/__init__.py": "",
        "lowrank/shared.py": "def f(x):\n    return x\n",
    }
    for name, text in files.items():
        path = tmp_path / "scripts" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return tmp_path / "scripts"


def memory(scripts: Path) -> Path:
    return scripts / "__pycache__/fingerprints.json"


def never() -> Found:
    raise AssertionError("it is known already")


def test_unchanged_code_is_not_parsed_again(scripts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = Code(scripts).fingerprint("search")
    monkeypatch.setattr(fingerprint, "Module", never)
    assert Code(scripts).fingerprint("search") == found
    with pytest.raises(TypeError, match="never"):
        Code(scripts).fingerprint("table")


@pytest.mark.parametrize(
    "change",
    [
        lambda scripts: (scripts / "lowrank/shared.py").write_text("def f(x):\n    return 2 * x\n"),
        lambda scripts: (scripts / "lowrank/new.py").write_text(""),
        lambda scripts: (scripts / "stages/table.py").unlink(),
        lambda scripts: (scripts / "lowrank/shared.py").rename(scripts / "lowrank/other.py"),
    ],
    ids=["changed", "added", "removed", "renamed"],
)
def test_any_change_of_a_file_counts(change: Callable[[Path], object], scripts: Path) -> None:
    Remembered(scripts).get(["search"], lambda: ("old", {}))
    assert Remembered(scripts).get(["search"], never) == ("old", {})
    change(scripts)
    assert Remembered(scripts).get(["search"], lambda: ("new", {})) == ("new", {})


def test_what_an_editor_leaves_beside_the_code_is_none(scripts: Path) -> None:
    """Emacs marks an unsaved file by a link to nowhere."""
    Remembered(scripts).get(["search"], lambda: ("old", {}))
    (scripts / "lowrank/.#shared.py").symlink_to("somebody@somewhere.123")
    (scripts / "lowrank/gone.py").symlink_to("nowhere.py")
    assert Remembered(scripts).get(["search"], never) == ("old", {})


def test_so_does_a_change_of_the_pins(scripts: Path, tmp_path: Path) -> None:
    pins = tmp_path / "requirements.txt"
    pins.write_text("pandas==2.3.3\n")
    assert Code(scripts, pins).packages("table") == {"pandas": "2.3.3"}
    pins.write_text("pandas==3.0.0\n")
    assert Code(scripts, pins).packages("table") == {"pandas": "3.0.0"}


@pytest.mark.parametrize("damage", ["", "{", "[]", '{"code": 1}', "null"])
def test_a_damaged_memory_is_none(damage: str, scripts: Path) -> None:
    found = Code(scripts).fingerprint("search")
    memory(scripts).write_text(damage)
    assert Code(scripts).fingerprint("search") == found
    assert json.loads(memory(scripts).read_text())["found"], "and is written anew"


def test_where_python_keeps_no_caches_nothing_is_kept(scripts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.dont_write_bytecode", True)
    Code(scripts).fingerprint("search")
    assert not memory(scripts).exists()


def test_a_folder_that_cannot_be_written_costs_time_only(scripts: Path) -> None:
    (scripts / "__pycache__").write_text("in the way")
    assert Code(scripts).fingerprint("search") == Code(scripts).fingerprint("search")
