"""Unfinished work is found again by those it belongs to, and by nobody else."""

import ast
import re
import shutil
from pathlib import Path

import pytest
import torch

from lowrank.errors import RankwiseError
from lowrank.jobs import state
from lowrank.jobs.state import Clock, Parts, resumable_state


def folder_of(root: Path, settings: object, file: Path) -> Path:
    with pytest.raises(InterruptedError), resumable_state(root, "search", settings, {"in": file}) as folder:
        raise InterruptedError
    return folder


def test_state_survives_a_failure_and_is_removed_on_success(tmp_path: Path) -> None:
    source = tmp_path / "input"
    source.write_text("one")
    folder = folder_of(tmp_path, {"a": 1}, source)
    assert folder.is_dir()
    with resumable_state(tmp_path, "search", {"a": 1}, {"in": source}) as again:
        assert again == folder
    assert not folder.exists()


def test_a_kill_while_it_is_removed_leaves_nothing_to_go_on_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "input"
    source.write_text("one")

    def killed(folder: Path, ignore_errors: bool) -> None:
        (folder / "checkpoint").unlink()
        raise KeyboardInterrupt

    state = resumable_state(tmp_path, "post_train", {"a": 1}, {"in": source})
    folder = state.__enter__()
    for name in ("checkpoint", "progress.json"):
        (folder / name).write_text("done")
    with monkeypatch.context() as patched:
        patched.setattr(shutil, "rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            state.__exit__(None, None, None)
    assert (folder / "progress.json").exists()
    with resumable_state(tmp_path, "post_train", {"a": 1}, {"in": source}) as again:
        assert again == folder
        assert [path.name for path in again.iterdir()] == ["key.json"]


def test_parts_are_found_again_with_the_time_that_they_took(tmp_path: Path) -> None:
    parts = Parts(tmp_path)
    assert parts.load("block_0") is None
    parts.clock.before = 100.0
    parts.save("block_0", {"w": torch.arange(3.0)})
    again = Parts(tmp_path)
    found = again.load("block_0")
    assert found is not None
    assert torch.equal(found["w"], torch.arange(3.0))
    assert 100 <= again.clock.seconds < 160
    (tmp_path / "block_0.safetensors").write_bytes(b"damaged")
    with pytest.raises(RankwiseError, match=f"Delete {tmp_path} and run the workflow again"):
        again.load("block_0")


def test_other_settings_or_inputs_have_another_folder(tmp_path: Path) -> None:
    source = tmp_path / "input"
    source.write_text("one")
    first = folder_of(tmp_path, {"a": 1, "b": 2}, source)
    assert folder_of(tmp_path, {"b": 2, "a": 1}, source) == first
    assert folder_of(tmp_path, {"a": 2, "b": 1}, source) != first
    source.write_text("two")
    assert folder_of(tmp_path, {"a": 1, "b": 2}, source) != first


@pytest.mark.parametrize("key", ['{"stage": "search", "settings": {"a": 2}}', "", "{", None])
def test_a_folder_that_belongs_to_another_job_is_not_used(tmp_path: Path, key: str | None) -> None:
    """It was renamed or copied, or its key is damaged; the name alone is not believed."""
    source = tmp_path / "input"
    source.write_text("one")
    folder = folder_of(tmp_path, {"a": 1}, source)
    (folder / "unfinished").write_text("of other settings")
    (folder / "key.json").unlink()
    if key is not None:
        (folder / "key.json").write_text(key)
    assert folder_of(tmp_path, {"a": 1}, source) == folder
    assert not (folder / "unfinished").exists()
    (folder / "unfinished").write_text("of these settings")
    with resumable_state(tmp_path, "search", {"a": 1}, {"in": source}):
        assert (folder / "unfinished").exists()


@pytest.mark.parametrize(
    "settings",
    [
        {"search": {"evaluations": 60}, "code": "aa", "packages": {"torch": "1"}},
        {"search": {"evaluations": 50}, "code": "bb", "packages": {"torch": "1"}},
        {"search": {"evaluations": 50}, "code": "aa", "packages": {"torch": "2"}},
    ],
)
def test_other_settings_code_or_packages_start_afresh(tmp_path: Path, settings: dict[str, object]) -> None:
    source = tmp_path / "input"
    source.write_text("one")
    first = {"search": {"evaluations": 50}, "code": "aa", "packages": {"torch": "1"}}
    folder = folder_of(tmp_path, first, source)
    assert folder_of(tmp_path, settings, source) != folder
    assert folder_of(tmp_path, dict(reversed(first.items())), source) == folder


def test_the_clock_adds_up_the_parts(tmp_path: Path) -> None:
    first = Clock(tmp_path / "seconds.json")
    first.before = 100.0
    first.save()
    assert 100.0 < Clock(tmp_path / "seconds.json").seconds < 200.0


STAGES = Path(state.__file__).parents[2] / "stages"


def inputs_in(node: ast.AST) -> set[str]:
    """The job's inputs that some code names."""
    attributes = [each for each in ast.walk(node) if isinstance(each, ast.Attribute)]
    return {each.attr for each in attributes if ast.unparse(each.value) == "job.input"}


RESUMABLE = (
    *("collect_gradients", "collect_statistics", "compress_model", "eliminate_neurons", "search_allocation"),
    "select_validation",
)
SUBJECT = re.compile(r'"(\w+)",\s+model_settings(?:(?!with_code).)*"subject": subject\(wildcards\)', re.DOTALL)
"""In the rules: settings of a stage that name its model, method, ratio and seed."""


def test_stages_with_unfinished_work_are_known() -> None:
    found = [path.stem for path in sorted(STAGES.glob("*.py")) if "resumable_state(" in path.read_text()]
    assert tuple(found) == RESUMABLE


@pytest.mark.parametrize("stage", RESUMABLE)
def test_unfinished_work_is_told_by_all_that_its_stage_reads_and_by_whose_it_is(stage: str) -> None:
    """By the contents of each input, a folder's being those of its manifest; and by the wildcards or the subject."""
    tree = ast.parse((STAGES / f"{stage}.py").read_text())
    assigned: dict[str, list[ast.expr]] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign | ast.AugAssign):
            for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
                assigned.setdefault(ast.unparse(target).partition("[")[0], []).append(node.value)
    (call,) = (
        node for node in ast.walk(tree) if isinstance(node, ast.Call) and ast.unparse(node.func) == "resumable_state"
    )
    *_, key, inputs = ([argument, *assigned.get(ast.unparse(argument), [])] for argument in call.args)
    known = set().union(*(inputs_in(expression) for expression in inputs))
    read = inputs_in(tree) - {"get", "items"}
    if "items" not in known:  # else all of them are
        assert {name for name in read if not {name, f"{name}_manifest"} & known} == set()
    told = " ".join(map(ast.unparse, key))
    named = SUBJECT.findall("".join(path.read_text() for path in (STAGES.parents[1] / "rules").glob("*.smk")))
    assert "job.wildcards.items()" in told or stage in named
    assert "settings" in told
