"""A start is refused while jobs of an earlier one are at work."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from lowrank.errors import RankwiseError
from lowrank.jobs.lock import Holder, lock_path, process_start
from lowrank.progress.steps import HEAD, refuse_beside_another_start, refuse_while_jobs_run


def test_nothing_starts_while_a_job_of_an_earlier_start_is_at_work(tmp_path: Path) -> None:
    refuse_while_jobs_run(tmp_path / "none")
    lock = lock_path(tmp_path / "allocation/tiny/allocation.json")
    lock.parent.mkdir(parents=True)
    here = Holder.here("search_allocation")
    lock.write_text(json.dumps(asdict(here)))
    with pytest.raises(RankwiseError) as caught:
        refuse_while_jobs_run(tmp_path)
    said = str(caught.value)
    assert f"jobs of an earlier start may still write to {tmp_path}, by these locks:\n  {lock}: search_alloc" in said
    assert f"process {here.process} on {here.host}" in said
    assert "its process still runs\nWait until they have ended" in said
    lock.write_text(json.dumps(asdict(replace(here, host="elsewhere", job=""))))
    with pytest.raises(RankwiseError, match="it cannot be told whether the process still runs"):
        refuse_while_jobs_run(tmp_path)
    with subprocess.Popen([sys.executable, "-c", ""]) as ended:
        ended.wait()
        lock.write_text(json.dumps(asdict(replace(here, process=ended.pid))))
    refuse_while_jobs_run(tmp_path)  # its holder is gone: the next job takes it over


def test_two_starts_do_not_work_on_one_run(tmp_path: Path) -> None:
    frozen = tmp_path / ".config.json"
    refuse_beside_another_start(frozen)
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as other:
        head = replace(Holder.here(HEAD), process=other.pid, started=process_start(other.pid) or "")
        frozen.write_text(json.dumps({"head": asdict(head)}))
        with pytest.raises(RankwiseError, match=rf"another start works on this run \(process {other.pid} on "):
            refuse_beside_another_start(frozen)
        other.communicate(b"\n")
    refuse_beside_another_start(frozen)
    frozen.write_text(json.dumps({"head": asdict(Holder.here(HEAD))}))  # this one, for the second time
    refuse_beside_another_start(frozen)
    frozen.write_text("{}")
    refuse_beside_another_start(frozen)
