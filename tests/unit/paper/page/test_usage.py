"""Time and memory by step, of the jobs that are behind what is shown and of no others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lowrank.files import write_json
from lowrank.paper.page.usage import Step, steps


def record(folder: Path, rule: str, name: str, reads: dict[str, str], wrote: dict[str, str], **usage: float) -> None:
    content: dict[str, Any] = {"rule": rule, "inputs": reads, "outputs": wrote}
    write_json(folder / rule / f"{name}.json", content | ({"usage": usage} if usage else {}))


def test_a_step_sums_the_jobs_behind_the_results(tmp_path: Path) -> None:
    record(tmp_path, "fetch_model", "m", {}, {"model": "1"}, seconds=5.0, peak_mib=100.0)
    record(tmp_path, "compress_model", "a", {"model": "1"}, {"a": "2"}, seconds=3.0, peak_mib=900.0)
    record(tmp_path, "compress_model", "b", {"model": "1"}, {"b": "3"}, seconds=8.0, peak_mib=700.0, gpu_peak_mib=50.0)
    record(tmp_path, "compress_model", "unused", {"model": "1"}, {"c": "4"}, seconds=100.0, peak_mib=5000.0)
    record(tmp_path, "compress_model", "of another time", {"model": "0"}, {"a": "old"}, seconds=100.0, peak_mib=5000.0)
    found = steps({"a": "2", "b": "3", "given": "5"}, tmp_path)
    assert found == [
        Step("compress_model", 2, 0, 11.0, 8.0, 900.0, 50.0),
        Step("fetch_model", 1, 0, 5.0, 5.0, 100.0, None),
    ]


def test_the_largest_process_of_a_job_counts(tmp_path: Path) -> None:
    record(tmp_path, "post_train", "a", {}, {"a": "1"}, seconds=3.0, peak_mib=400.0, child_peak_mib=2000.0)
    assert steps({"a": "1"}, tmp_path)[0].peak_mib == 2000.0


def test_records_that_tell_nothing_are_counted(tmp_path: Path) -> None:
    record(tmp_path, "post_train", "a", {}, {"a": "1"})
    assert steps({"a": "1"}, tmp_path) == [Step("post_train", 1, 1, 0.0, 0.0, None, None)]
    assert steps({"a": "1"}, tmp_path / "nothing") == []
