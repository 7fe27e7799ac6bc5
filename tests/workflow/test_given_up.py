"""Checkpoints that were given up: what a later suite makes again."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from tests.workflow.clones import REPOSITORY, clone, pool, pretend_finished, read_config, reruns, write_config

CHECKPOINTS = ("--cores", "1", "checkpoints")  # an option first: --configfile takes more than one file


def keeping(folder: Path, kept: dict[str, list[Any]]) -> tuple[Path, dict[str, Any]]:
    """A checkout whose quickstart keeps some checkpoints, and that config."""
    place = clone(REPOSITORY, folder / "checkout")
    content = read_config(place, "quickstart")
    content["keep_checkpoints"] = kept
    write_config(place, "quickstart", content)
    return place, content


def test_a_new_suite_makes_a_checkpoint_that_was_given_up_again_and_nothing_that_was_made_from_it(
    tmp_path: Path,
) -> None:
    """`snakemake checkpoints` first; the manifest of the same checkpoint comes out as it was."""
    place, content = keeping(tmp_path, {"ratios": [20]})
    with pool() as processes:
        processes.submit(pretend_finished, place, "quickstart").result()
        folders = [path.with_name("checkpoint") for path in place.glob("results/quickstart/**/30/**/given_up.json")]
        assert folders
        for folder in folders:
            shutil.rmtree(folder)
        assert not processes.submit(reruns, place, "quickstart").result()

        content["suites"]["shorter"] = content["suites"]["held-out"] | {"length": 64}
        content["tables"]["shorter"] = content["tables"]["table_1"] | {"suites": ["shorter"], "title": "Shorter"}
        write_config(place, "quickstart", content)
        again = processes.submit(reruns, place, "quickstart", *CHECKPOINTS).result()
        assert {(job.rule, job.wildcards["ratio"]) for job in again} == {("compress_model", "30")}
        assert len(again) == len(folders)

        for folder in folders:
            folder.mkdir()
            folder.with_name("manifest.json").touch()
        found = processes.submit(reruns, place, "quickstart").result()
    new = [job for job in found if job.wildcards.get("suite") == "shorter"]
    assert len(new) == len(content["tables"]["table_1"]["rows"])
    rules = sorted(job.rule for job in found if job not in new)
    assert rules == [*["give_up_checkpoint"] * len(folders), "make_table", "write_provenance", "write_report"]


def test_what_was_made_again_as_a_step_to_a_tuned_one_is_given_up_again(tmp_path: Path) -> None:
    """Both manifests come out as they were; the file that says that a checkpoint was given up goes when it is made."""
    place, _ = keeping(tmp_path, {"methods": []})
    with pool() as processes:
        processes.submit(pretend_finished, place, "quickstart").result()
        run = place / "results/quickstart"
        (tuned,) = run.glob("tuned/**/given_up.json")
        steps = [tuned, run / "compressed/smollm2-135m/bolaco-5x1/20/seed0/given_up.json"]
        for path in run.glob("**/given_up.json"):
            if path not in steps:
                shutil.rmtree(path.with_name("checkpoint"))
        for path in steps:
            path.unlink()
        found = processes.submit(reruns, place, "quickstart").result()
    assert [job.rule for job in found] == ["give_up_checkpoint"] * 2


def test_a_result_that_is_stale_is_deleted_first_and_then_made_with_the_least(tmp_path: Path) -> None:
    """So docs/reruns.md says. Left where it is, it makes all else that reads the checkpoint run again too."""
    place, content = keeping(tmp_path, {"methods": []})
    with pool() as processes:
        processes.submit(pretend_finished, place, "quickstart").result()
        run = place / "results/quickstart"
        folders = [path.with_name("checkpoint") for path in run.glob("**/given_up.json")]
        for folder in folders:
            shutil.rmtree(folder)
        content["suites"]["zero-shot"]["limit"] = 50
        write_config(place, "quickstart", content)
        assert not processes.submit(reruns, place, "quickstart", *CHECKPOINTS).result()
        stale = processes.submit(reruns, place, "quickstart").result()
        for path in run.glob("evaluation/**/zero-shot.json"):
            path.unlink()
        again = processes.submit(reruns, place, "quickstart", *CHECKPOINTS).result()
        for job in again:
            method, ratio = job.wildcards["method"], job.wildcards["ratio"]
            folder = run / f"compressed/smollm2-135m/{method}/{ratio}/seed0"
            (folder / "checkpoint").mkdir()
            (folder / "manifest.json").touch()
            (folder / "given_up.json").unlink()
        found = processes.submit(reruns, place, "quickstart").result()
    assert {"compress_model", "post_train", "evaluate_perplexity", "evaluate_cost"} <= {job.rule for job in stale}
    judged = {(row["method"], str(row.get("ratio", 0))) for row in content["tables"]["table_2"]["rows"]}
    assert {(job.wildcards["method"], job.wildcards["ratio"]) for job in again} == judged - {("dense", "0")}
    assert {job.rule for job in again} == {"compress_model"}
    assert sorted(job.rule for job in found) == [
        *["evaluate_zero_shot"] * len(judged),
        *["give_up_checkpoint"] * len(again),
        *("make_table", "write_provenance", "write_report"),
    ]
