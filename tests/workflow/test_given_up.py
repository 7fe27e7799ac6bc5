"""Checkpoints that were given up: what a later suite makes again."""

from __future__ import annotations

import shutil
from pathlib import Path

from tests.workflow.clones import REPOSITORY, clone, pool, pretend_finished, read_config, reruns, write_config


def test_a_new_suite_makes_a_checkpoint_that_was_given_up_again_and_nothing_that_was_made_from_it(
    tmp_path: Path,
) -> None:
    """`snakemake checkpoints` first; the manifest of the same checkpoint comes out as it was."""
    place = clone(REPOSITORY, tmp_path / "checkout")
    content = read_config(place, "quickstart")
    content["keep_checkpoints"] = {"ratios": [20]}
    write_config(place, "quickstart", content)
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
        again = processes.submit(reruns, place, "quickstart", "--cores", "1", "checkpoints").result()
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
