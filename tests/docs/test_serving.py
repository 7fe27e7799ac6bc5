"""docs/serving.md does what it says: its commands through make, and its Python, on a tiny checkpoint."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lowrank.model.checkpoint import save_checkpoint
from tests import tiny
from tests.unit.export.export_samples import IDS, MAKES
from tests.warm import REPOSITORY

sys.path.insert(0, str(REPOSITORY / "workflow_scripts"))
import export

PAGE = (REPOSITORY / "docs/serving.md").read_text(encoding="utf-8")
COMMANDS = re.findall(r"^    (make export .*)$", PAGE, re.MULTILINE)
OPEN_DENSE, COMPILE = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)


def arguments(command: str, folder: Path) -> list[str]:
    """What make hands to the script; variables of the environment are no options."""
    (folder / ".installed").touch()
    outside = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    made = subprocess.run(
        [
            *shlex.split(command),
            "--no-print-directory",
            "--dry-run",
            f"--old-file={folder}/.installed",
            f"VENV={folder}",
        ],
        cwd=REPOSITORY,
        env=outside | {"OUT": "/elsewhere", "CHECKPOINT": "/elsewhere"},
        capture_output=True,
        text=True,
        check=True,
    )
    return shlex.split(made.stdout)[2:]


@pytest.fixture
def there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a checkpoint, in which commands are run."""
    tiny.tokenizer().save_pretrained(tmp_path / "tokenizer")
    save_checkpoint(MAKES["identity blocks"]("llama-gqa"), tmp_path / "tokenizer", tmp_path / "folder")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    return tmp_path


def test_the_commands_make_what_they_name(there: Path) -> None:
    assert len(COMMANDS) == 3
    for command in COMMANDS:
        given = arguments(command, there)
        assert export.main(given) == 0, command
        assert (there / given[-1]).exists()
    found: dict[str, object] = {}
    exec(OPEN_DENSE, found)
    assert type(found["model"]).__module__ == "transformers.models.llama.modeling_llama"
    expected = MAKES["identity blocks"]("llama-gqa")(IDS).logits
    assert torch.allclose(found["model"](IDS).logits, expected, atol=1e-5)  # type: ignore[operator]


def test_make_hands_on_nothing_of_the_environment(there: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert export.main(arguments("make export TO=dense", there)) == 1
    assert "CHECKPOINT: missing" in capsys.readouterr().err


def test_a_checkpoint_compiles_into_one_graph(there: Path) -> None:
    """Traced as a whole; to compile what was traced would take a minute."""
    found: dict[str, object] = {}
    exec(COMPILE.replace("fullgraph=True", 'fullgraph=True, backend="eager"'), found)
    expected = MAKES["identity blocks"]("llama-gqa")(IDS).logits
    assert torch.allclose(found["compiled"](IDS).logits, expected, atol=1e-4)  # type: ignore[operator]
