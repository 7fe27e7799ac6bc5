"""The commands of the documents: Snakemake, make and Python read them as they are meant.

What is not read here needs a network (git, pip, hf), SLURM (squeue, scancel) or a program that is not ours (vllm).
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
from importlib.util import find_spec
from pathlib import Path

import pytest
from snakemake.cli import get_argument_parser

from tests.config.wrong import REPOSITORY

PAGES = [REPOSITORY / name for name in ("README.md", "CONTRIBUTING.md", "config/README.md", "profiles/README.md")]
PAGES += [*sorted((REPOSITORY / "docs").glob("*.md"))]
COMMANDS = [
    (path.name, command)
    for path in PAGES
    for command in re.findall(r"^(?:    |\t)(snakemake .*)$", path.read_text(encoding="utf-8"), re.MULTILINE)
]
OPTIONS = set(re.findall(r"\b[A-Z]+\b", re.sub(r"(?m)^#.*", "", (REPOSITORY / "Makefile").read_text(encoding="utf-8"))))
"""Names in the Makefile; those of its variables are among them."""
TARGETS = {"all", "checkpoints", "data"}
YOURS = ("FILE", "config/mine.yaml", "OUT/study.yaml")


@pytest.mark.parametrize(("page", "command"), COMMANDS)
def test_options_take_what_is_meant_for_them(page: str, command: str) -> None:
    """`--configfile FILE data` would read `data` as a second file."""
    read = get_argument_parser().parse_args(shlex.split(command, comments=True)[1:])
    assert set(read.targets) <= TARGETS
    for name in read.configfile or []:
        known = (REPOSITORY / name).is_file()
        assert known or str(name) in YOURS, "a config of this repository, or a name to be replaced"
    for name in read.profile or []:
        assert name == "mysite" or (REPOSITORY / name).is_dir(), name
    if not read.dryrun and not read.unlock:
        assert read.profile, "without a profile Snakemake asks for --cores"


def test_there_are_commands_to_read() -> None:
    assert {page for page, _ in COMMANDS} >= {"README.md", "paper.md", "cluster.md"}


# --- make and Python ---


def named(program: str) -> list[str]:
    """Commands of a program in lines of their own and within sentences, with their options, each once."""
    found: dict[str, None] = {}
    for path in PAGES:
        text = path.read_text(encoding="utf-8")
        lines = re.findall(rf"(?:^    |# or: )(?:\S+=\S+ )?({program} .*)$", text, re.MULTILINE)
        found |= dict.fromkeys([*lines, *re.findall(rf"`(?:\S+=\S+ )?({program} [^`\n]+)`", text)])
    commands = [shlex.split(line.partition(" && ")[0], comments=True) for line in found]
    return sorted({shlex.join(command) for command in commands})


@pytest.mark.parametrize("command", named("make"))
def test_make_hands_on_every_option(command: str) -> None:
    words = [*shlex.split(command), "--dry-run", "--no-print-directory"]
    made = subprocess.run(words, cwd=REPOSITORY, capture_output=True, text=True)
    assert made.returncode == 0, made.stderr
    for name, value in (word.split("=", 1) for word in words if re.match("[A-Z]+=", word)):
        assert name in OPTIONS
        assert value in made.stdout, f"{name} changes nothing"
        assert name != "CONFIG" or value in YOURS or (REPOSITORY / value).is_file()


@pytest.mark.parametrize("option", ["plan CONFIG", "why CONFIG", "status RUN"])
def test_make_hands_on_a_path_with_a_space(option: str) -> None:
    target, name = option.split()
    words = ["make", target, f"{name}=my studies/a b", "--dry-run", "--no-print-directory"]
    assert "my studies/a b" in shlex.split(subprocess.run(words, cwd=REPOSITORY, capture_output=True, text=True).stdout)


def test_an_environment_whose_path_has_a_space_is_refused_before_it_is_made(tmp_path: Path) -> None:
    """Snakemake starts jobs by the interpreter's path as it is."""
    place = tmp_path / "a b"
    place.mkdir()
    shutil.copy2(REPOSITORY / "Makefile", place)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    for venv, fails in ((".venv", True), (str(tmp_path / "venv"), False)):
        words = ["make", "--dry-run", "--no-print-directory", f"VENV={venv}", "--assume-old=setup", "status"]
        made = subprocess.run(words, cwd=place, env=environment, capture_output=True, text=True)
        assert ("a space divides it" in made.stderr) == fails == bool(made.returncode)


@pytest.mark.parametrize("command", named("python3?"))
def test_python_finds_what_it_is_to_run(command: str) -> None:
    _, *words = shlex.split(command)
    if words[0] != "-m":
        script = REPOSITORY / words[0]
        assert words[0] in ("generate.py", "-") or script.is_file()  # that of docs/checkpoints.md has a test of its own
        options = [word for word in words if word.startswith("--")] if script.is_file() else []
        if words[0].endswith("run.py"):
            get_argument_parser().parse_args(words[1:])
        else:
            assert all(f'"{option}"' in script.read_text(encoding="utf-8") for option in options)
    elif words[1] == "pytest":
        assert (
            words[2].endswith("_xz.py") or (REPOSITORY / words[2]).exists()
        )  # that of CONTRIBUTING.md is to be written
    else:
        assert find_spec(words[1])


def test_commands_of_make_and_python_are_found() -> None:
    assert "make plan CONFIG=config/paper.yaml" in named("make")
    assert "python workflow_scripts/compress.py /data/my-model 20" in named("python3?")
