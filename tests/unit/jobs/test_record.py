"""The record of a finished job: what made its outputs."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lowrank.errors import RankwiseError
from lowrank.files import digest_of
from lowrank.jobs.record import made_with, record_file, records_of, write_job_record
from lowrank.paper.provenance import describe_run

SETTINGS: dict[str, Any] = {
    "search": {"evaluations": 50},
    "code": "0123456789abcdef",
    "packages": {"PyYAML": "1.0", "torch": "2.0"},
}

USAGE = {"seconds": 12.5, "peak_mib": 800.0}


def sha256(path: str) -> str:
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


@pytest.fixture
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A finished job in a working directory, as Snakemake tells a stage of it."""
    monkeypatch.chdir(tmp_path)
    run = Path("results/tiny")
    for name in ("in.json", "out.json", "more.csv", "folder/part"):
        (run / name).parent.mkdir(parents=True, exist_ok=True)
        (run / name).write_text(f"content of {name}")
    return SimpleNamespace(
        rule="search_allocation",
        wildcards={"model": "m", "seed": 0},
        params={"settings": SETTINGS},
        input=[f"{run}/in.json", f"{run}/folder"],
        output=[f"{run}/out.json", f"{run}/more.csv"],
        log=[f"{run}/logs/search_allocation/m/seed0.log"],
        threads=2,
    )


def written(job: SimpleNamespace, project: Path) -> dict[str, Any]:
    write_job_record(job, project, USAGE)  # type: ignore[arg-type]
    found: dict[str, Any] = json.loads(Path("results/tiny/records/search_allocation/m/seed0.json").read_text())
    return found


def test_a_record_says_what_made_the_outputs(job: SimpleNamespace, tmp_path: Path) -> None:
    record = written(job, tmp_path)
    assert record["rule"] == "search_allocation"
    assert record["wildcards"] == {"model": "m", "seed": "0"}
    assert record["config_digest"] == digest_of({"search": {"evaluations": 50}})
    assert record["code"] == "0123456789abcdef"
    assert record["pins"] == SETTINGS["packages"]
    assert record["versions"]["torch"] == torch.__version__, "the installed one, whatever is pinned"
    assert record["versions"]["PyYAML"] not in ("absent", "1.0")
    assert record["git"] == {"commit": "unknown", "dirty": None}
    assert record["inputs"] == {"results/tiny/in.json": sha256("results/tiny/in.json")}, "folders have manifests"
    assert record["outputs"] == {path: sha256(path) for path in job.output}
    assert record["usage"] == USAGE
    assert record["device"] == (torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu")


def test_equal_jobs_have_equal_records(job: SimpleNamespace, tmp_path: Path) -> None:
    first = written(job, tmp_path)
    job.params = {"settings": dict(reversed(SETTINGS.items()))}
    assert written(job, tmp_path) == first
    job.params = {"settings": SETTINGS | {"search": {"evaluations": 51}}}
    assert written(job, tmp_path)["config_digest"] != first["config_digest"]
    job.params = {"settings": SETTINGS | {"code": "other"}}
    assert written(job, tmp_path)["config_digest"] == first["config_digest"]


def test_a_job_without_a_log_of_the_workflow_has_no_record(job: SimpleNamespace, tmp_path: Path) -> None:
    assert record_file("stage.log") is None
    job.log = []
    write_job_record(job, tmp_path, USAGE)  # type: ignore[arg-type]
    assert not Path("results/tiny/records").exists()


def test_the_provenance_tells_of_each_artefact(job: SimpleNamespace, tmp_path: Path) -> None:
    record = written(job, tmp_path)
    artefacts = [*job.output, "results/tiny/in.json"]
    assert records_of(artefacts, Path("results/tiny/records")).keys() == set(job.output)
    provenance = describe_run("tiny", {}, artefacts, "results/tiny")
    assert provenance["artefacts"].keys() == {"in.json", "more.csv", "out.json"}
    assert provenance["made_by"].keys() == {"more.csv", "out.json"}
    keys = ("rule", "config_digest", "code", "git", "inputs", "versions", "device")
    assert provenance["made_by"]["out.json"] == {key: record[key] for key in keys}


def test_what_was_changed_by_hand_was_made_by_nobody(job: SimpleNamespace, tmp_path: Path) -> None:
    written(job, tmp_path)
    Path("results/tiny/more.csv").write_text("other numbers")
    provenance = describe_run("tiny", {}, job.output, "results/tiny")
    assert provenance["made_by"].keys() == {"out.json"}


def test_a_damaged_record_is_named(job: SimpleNamespace, tmp_path: Path) -> None:
    written(job, tmp_path)
    path = Path("results/tiny/records/search_allocation/m/seed0.json")
    path.write_text("{")
    with pytest.raises(RankwiseError, match=r"seed0\.json: damaged"):
        describe_run("tiny", {}, job.output, "results/tiny")


def test_a_record_tells_whether_settings_code_or_pins_have_changed(job: SimpleNamespace, tmp_path: Path) -> None:
    written(job, tmp_path)
    file = record_file(job.log[0])
    assert file is not None
    assert made_with(file, SETTINGS)
    for changed in ({"search": {"evaluations": 20}}, {"code": "0"}, {"packages": {"torch": "2.1"}}):
        assert made_with(file, SETTINGS | changed) is False
    Path(job.output[1]).write_text("of another job")
    assert made_with(file, SETTINGS) is None
    assert made_with(None, SETTINGS) is None
    assert made_with(file.with_name("other.json"), SETTINGS) is None
    file.write_text("{")
    assert made_with(file, SETTINGS) is None
