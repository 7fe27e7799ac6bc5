"""What a contributor and a catalogue meet first: hooks, continuous integration, and pages call what is there."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

REPOSITORY = Path(__file__).parents[2]
MAKEFILE = (REPOSITORY / "Makefile").read_text(encoding="utf-8")
TARGETS = set(re.findall(r"^([\w-]+):", MAKEFILE, re.MULTILINE))
PAGES = [REPOSITORY / name for name in ("README.md", "CONTRIBUTING.md", "profiles/README.md", "config/README.md")]
PAGES += sorted((REPOSITORY / "docs").glob("*.md"))
CALLERS = [*PAGES, *(REPOSITORY / name for name in (".ci/run", ".github/workflows/ci.yml", ".pre-commit-config.yaml"))]
CALL = re.compile(r"(?:^ +(?:- run: |entry: )?|exec |`)make(?: [A-Z_]+=\S+)* ([a-z][\w-]*)", re.MULTILINE)


def read(name: str) -> Any:
    """A YAML file of the repository."""
    return yaml.safe_load((REPOSITORY / name).read_text(encoding="utf-8"))


WORKFLOW = read(".github/workflows/ci.yml")
(HOOKS,) = [each["hooks"] for each in read(".pre-commit-config.yaml")["repos"] if each["repo"] == "local"]


@pytest.mark.parametrize("path", CALLERS, ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_what_calls_make_calls_a_target(path: Path) -> None:
    assert set(CALL.findall(path.read_text(encoding="utf-8"))) <= TARGETS


def test_calls_of_make_are_found() -> None:
    calls = {path.name: set(CALL.findall(path.read_text(encoding="utf-8"))) for path in CALLERS}
    assert calls["run"] == {"test"}
    assert calls["ci.yml"] == {"check", "test"}
    assert calls[".pre-commit-config.yaml"] >= {"schema", "setup"}
    assert calls["CONTRIBUTING.md"] >= {"setup", "check", "test", "test-slurm", "schema", "why"}


# --- hooks ---


def recipe(target: str) -> list[str]:
    """The commands of a target."""
    (found,) = re.findall(rf"^{target}:.*\n((?:\t.*\n)+)", MAKEFILE, re.MULTILINE)
    return [line.strip() for line in found.splitlines()]


def test_hooks_run_what_is_pinned() -> None:
    listed = {line.split()[0] for line in (REPOSITORY / "envs/requirements.in").read_text().splitlines() if line}
    for hook in HOOKS:
        assert hook["language"] == "system"
        program, *arguments = hook["entry"].split()
        if program == "make":
            assert set(arguments) <= TARGETS
        else:
            assert program in {f".venv/bin/{name}" for name in listed}


def test_what_lint_says_of_style_has_a_hook() -> None:
    entries = [hook["entry"].removeprefix(".venv/bin/") for hook in HOOKS]
    style = [line for line in recipe("style") if line.startswith(("ruff", "snakefmt"))]
    assert len(style) == 3
    for line in style:
        command = " ".join(re.findall(r"^ruff \w+|^\w+", line))
        assert any(entry == command or entry.startswith(f"{command} ") for entry in entries), line


def test_the_hook_for_rules_sees_the_files_that_lint_sees() -> None:
    (line,) = [line for line in recipe("style") if line.startswith("snakefmt")]
    seen = set()
    for place in line.split()[2:]:
        path = REPOSITORY / place
        seen |= {path} if path.is_file() else set(path.rglob("*.smk"))
    (pattern,) = [hook["files"] for hook in HOOKS if hook["id"] == "snakefmt"]
    files = [path for folder in (".", "rules", "workflow_scripts", "tests") for path in (REPOSITORY / folder).glob("*")]
    hooked = {path for path in files if re.search(pattern, str(path.relative_to(REPOSITORY)))}
    assert hooked == seen


def test_the_hook_for_generated_files_sees_them_and_what_they_come_from() -> None:
    (pattern,) = [hook["files"] for hook in HOOKS if hook["entry"] == "make schema"]
    written = [line.split()[-1] for line in recipe("schema") if line.startswith("mv ")]
    sources = ["workflow_scripts/lowrank/config/study.py", "workflow_scripts/lowrank/methods/svd_llm.py"]
    assert len(written) == 2
    assert all((REPOSITORY / name).is_file() and re.search(pattern, name) for name in (*written, *sources))


# --- continuous integration ---


def test_ci_runs_on_pushes_and_pull_requests_and_may_only_read() -> None:
    assert set(WORKFLOW[True]) == {"push", "pull_request"}, "YAML reads the key `on` as true"
    assert WORKFLOW["permissions"] == {"contents": "read"}
    assert not [job for job in WORKFLOW["jobs"].values() if "permissions" in job or job["timeout-minutes"] > 120]


def test_ci_pins_what_it_uses() -> None:
    steps = [step for job in WORKFLOW["jobs"].values() for step in job["steps"]]
    assert all(re.fullmatch(r"[\w-]+/[\w-]+@[0-9a-f]{40}", step["uses"]) for step in steps if "uses" in step)
    assert not [job["runs-on"] for job in WORKFLOW["jobs"].values() if "latest" in job["runs-on"]]
    pythons = [step["with"] for step in steps if "setup-python" in step.get("uses", "")]
    dependencies = read("envs/rankwise.yaml")["dependencies"]
    assert len(pythons) == len(WORKFLOW["jobs"])
    for python in pythons:
        assert f"python={python['python-version']}" in dependencies
        assert (REPOSITORY / python["cache-dependency-path"]).is_file()


def test_ci_runs_nothing_but_targets() -> None:
    runs = [step["run"] for job in WORKFLOW["jobs"].values() for step in job["steps"] if "run" in step]
    assert sorted(runs) == ["make check", "make test"]


# --- the catalogue of workflows ---


def test_the_catalogue_is_told_what_rules_do() -> None:
    usage = read(".snakemake-workflow-catalog.yml")["usage"]
    rules = [
        text
        for path in sorted((REPOSITORY / "rules").glob("*.smk"))
        for text in re.split(r"^rule ", path.read_text(), flags=re.M)[1:]
    ]
    code = [text for text in rules if re.search(r"^    script:", text, re.M)]
    assert len(code) > 20
    deployment = usage["software-stack-deployment"]
    assert deployment["conda"] == all(re.search(r"^    conda:\n +\S*envs/rankwise.yaml", text, re.M) for text in code)
    assert deployment["apptainer"] == any(re.search(r"^    container:", text, re.M) for text in rules)
    assert usage["report"] == any(re.search(r"\breport\(", text) for text in rules)
    named = re.findall(r"--(?:configfile|profile) (\S+)", usage["mandatory-flags"]["flags"])
    assert len(named) == 2
    assert all((REPOSITORY / name).exists() for name in named)


def test_the_page_of_the_config_names_every_file_beside_it() -> None:
    if not (REPOSITORY / ".git").exists():
        pytest.skip("this is no checkout of git, and the folder may hold studies of one's own")
    listed = subprocess.run(
        ["git", "-C", str(REPOSITORY / "config"), "ls-files"], capture_output=True, text=True, check=True
    ).stdout.split()
    page = (REPOSITORY / "config/README.md").read_text(encoding="utf-8").partition("\n## ")[0]
    rows = re.findall(r"^\| `([^`]+)` \| (.*) \|$", page, re.MULTILINE)
    for file in listed:
        folder, _, name = file.rpartition("/")
        found = [what for place, what in rows if place == (f"{folder}/" if folder else name)]
        assert found or file == "README.md", f"{file} is not on the page"
        # Tables are named by the first and the last.
        assert not folder or f"`{name}`" in found[0] or (folder == "published" and in_between(name, found[0])), file
    assert {place.rstrip("/") for place, _ in rows} <= {file.partition("/")[0] for file in listed}


def in_between(name: str, text: str) -> bool:
    """Whether a numbered file lies between two that a text names, `table_1.csv` to `table_8.csv`."""
    first, last = re.findall(r"`table_(\d+)\.csv`", text)
    number = re.fullmatch(r"table_(\d+)\.csv", name)
    return bool(number) and int(first) <= int(number[1]) <= int(last)
