"""The whole workflow on a tiny random model, through the real rules, in a folder whose name has a space."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
import yaml

from lowrank.calibration.corpora import consecutive_windows, load_documents
from lowrank.files import sha256_file
from lowrank.jobs.forkserver import SERVER, forks_are_safe
from lowrank.layout import study_of
from lowrank.model.checkpoint import load_checkpoint
from lowrank.model.tokenizer import load_tokenizer
from lowrank.progress.steps import State, steps_of
from tests import tiny_study
from tests.apt import Unavailable
from tests.browser import browser, check_page
from tests.warm import ENVIRONMENT, Warm

ROOT = Path(__file__).parents[2]
ALLOCATION = "results/tiny/allocation/tiny/bolaco/20/seed0"


class Study:
    """A finished study; Snakemake runs it as a user would, with the same arguments."""

    def __init__(self, folder: Path, warm: Warm) -> None:
        self.folder, self._warm = folder, warm
        self._environment = os.environ | ENVIRONMENT

    def snakemake(self, *arguments: str) -> str:
        """Run it to its end; its output, after a check that it succeeded."""
        run = self._warm.run(self._arguments(*arguments), self._environment)
        assert run.returncode == 0, run.stdout
        return run.stdout

    def type_command(self, *arguments: str, **variables: str) -> None:
        """The same as a user types it: processes that have loaded nothing."""
        command = [sys.executable, "-m", "snakemake", *self._arguments(*arguments)]
        environment = self._environment | variables
        run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
        assert run.returncode == 0, run.stdout + run.stderr

    def kill(self, target: str, now: Callable[[], bool]) -> None:
        """Start it, and kill it with all its jobs (SIGKILL) as soon as `now()`."""
        run = self._warm.kill(self._arguments(target), self._environment, now)
        assert run.returncode == -signal.SIGKILL, f"it ended before it could be killed\n{run.stdout}"

    def _arguments(self, *more: str) -> list[str]:
        return [
            *("--snakefile", str(ROOT / "Snakefile"), "--directory", str(self.folder)),
            *("--configfile", str(self.folder / "tiny.yaml"), "--profile", str(ROOT / "profiles/local"), *more),
        ]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, warm: Warm) -> Study:
    folder = tmp_path_factory.mktemp("tiny study")
    tiny_study.write_study(folder)
    made = Study(folder, warm)
    made.snakemake()
    return made


@pytest.fixture(scope="module")
def study(finished: Study) -> Path:
    """Its folder."""
    return finished.folder


def results(study: Path, pattern: str) -> list[Path]:
    return sorted((study / "results/tiny").glob(pattern))


def test_everything_that_was_asked_for_is_there(study: Path) -> None:
    tables = {path.name for path in results(study, "tables/*")}
    assert tables == {
        f"{name}.{kind}"
        for name in (
            *(f"table_{number}" for number in (1, 2, 7, 8, 9, 10)),
            "agreement",
            "arithmetic",
            "differences",
            "times",
        )
        for kind in ("csv", "md", "tex", "html")
    }
    figures = {path.name for path in results(study, "figures/*")}
    assert figures == {f"figure_{number}.{kind}" for number in (1, 3, 4, 5, 6) for kind in ("pdf", "png", "csv")}
    report = (study / "results/tiny/report.html").read_text()
    assert "Accuracy" in report
    assert "Sensitivity" in report


def test_the_report_of_a_study_fits_every_window_and_stands_alone(study: Path, tmp_path: Path) -> None:
    try:
        with browser(tmp_path) as page:
            check_page(page, study / "results/tiny/report.html")
    except Unavailable as error:
        pytest.skip(str(error))


def test_the_report_tells_of_every_step_what_it_took(study: Path) -> None:
    report = (study / "results/tiny/report.html").read_text()
    usage = report[report.index('id="usage"') : report.index('id="run"')]
    for rule in ("fetch_model", "collect_statistics", "search_allocation", "post_train", "evaluate_zero_shot"):
        assert re.search(rf">{rule}</th><td class=\"number\">[\d.]+<", usage), rule
    assert "not told" not in usage


def test_the_report_of_snakemake_shows_tables_figures_and_the_page(finished: Study, tmp_path: Path) -> None:
    finished.snakemake("--report", str(tmp_path / "snakemake.html"))
    html = (tmp_path / "snakemake.html").read_text()
    for shown in ("tables/table_1.html", "figures/figure_3.png", "report.html"):
        assert f"results/tiny/{shown}" in html
    for caption in ("as CSV with all digits", "exactly the values that are drawn", "It needs no network"):
        assert caption in html


def test_the_notebook_of_the_docs_draws_the_results(study: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT / "docs")
    monkeypatch.setenv("MPLBACKEND", "Agg")
    cells = json.loads(Path("results.ipynb").read_text(encoding="utf-8"))["cells"]
    assert not any(cell.get("outputs") for cell in cells)
    names: dict[str, Any] = {}
    for cell in cells:
        if cell["cell_type"] == "code":
            exec("".join(cell["source"]).replace("../results/quickstart", str(study / "results/tiny")), names)
    assert set(names["rise"].index.get_level_values("method")) == {"svd", "lord", "bolaco", "rankwise", "flap"}
    assert len(names["axes"].lines) == 5


def test_the_status_of_a_finished_run_is_that_all_is_done(study: Path) -> None:
    run = study / "results/tiny"
    steps = steps_of(study_of(run), study)
    assert {step.state for step in steps} == {State.DONE}
    assert all(step.seconds is not None for step in steps)
    assert sorted(str(step.log) for step in steps) == sorted(map(str, run.glob("logs/**/*.log")))


def test_a_second_run_has_nothing_to_do(finished: Study) -> None:
    assert "Nothing to be done" in finished.snakemake()


def test_finished_work_leaves_no_state_behind(study: Path) -> None:
    assert not results(study, ".state/*")
    assert not [path for path in results(study, "**/*") if path.name.endswith(".tmp")]


def test_each_number_of_the_main_table_stands_in_a_json(study: Path) -> None:
    table = pd.read_csv(study / "results/tiny/tables/table_1.csv")
    ours = table[table["source"] == "ours"]
    assert len(ours) == 5
    for row in ours.to_dict(orient="records"):
        tuning = "none" if pd.isna(row["tuning"]) else row["tuning"]
        folder = study / f"results/tiny/evaluation/tiny/{row['method']}/{row['target_removed_percent']}/{tuning}/seed0"
        perplexity = json.loads((folder / "held-out.json").read_text())
        accuracy = json.loads((folder / "zero-shot.json").read_text())
        for corpus, found in perplexity["corpora"].items():
            assert row[f"{corpus}_perplexity"] == pytest.approx(found["perplexity"])
        for task, found in accuracy["tasks"].items():
            assert row[task] == pytest.approx(100 * found[found["metric"]])
        assert accuracy["smoke"] is True
        assert perplexity["environment"]["packages"]["torch"] == torch.__version__


def test_each_result_says_what_made_it(study: Path) -> None:
    provenance = json.loads((study / "results/tiny/provenance.json").read_text())
    assert provenance["made_by"].keys() == provenance["artefacts"].keys()
    for path, made in provenance["made_by"].items():
        assert made["code"], path
        assert made["versions"]["torch"] == torch.__version__, path
        assert made["git"].keys() == {"commit", "dirty"}, path
        assert made["inputs"], path
    for path in results(study, "tables/*.csv") + results(study, "figures/*.csv"):
        rule = {"tables": "make_table", "figures": "draw_figure"}[path.parent.name]
        record = json.loads((study / f"results/tiny/records/{rule}/{path.stem}.json").read_text())
        assert record["outputs"][f"results/tiny/{path.parent.name}/{path.name}"] == sha256_file(path)


def test_a_perplexity_is_what_transformers_computes(study: Path) -> None:
    """An independent evaluation of one number of the table: full logits, the library's own loss."""
    run = study / "results/tiny"
    checkpoint = run / "compressed/tiny/bolaco/20/seed0/checkpoint"
    model = load_checkpoint(checkpoint, torch.float32)
    windows = consecutive_windows(
        load_documents(run / "corpora/test-a.json"), load_tokenizer(checkpoint), 64, windows=2
    )
    losses = [model(ids[None].long(), labels=ids[None].long()).loss for ids in windows]
    expected = float(torch.stack(losses).mean().exp())
    found = json.loads((run / "evaluation/tiny/bolaco/20/none/seed0/held-out.json").read_text())
    assert found["corpora"]["test-a"]["perplexity"] == pytest.approx(expected, rel=1e-4)


def test_the_budget_holds_for_every_checkpoint(study: Path) -> None:
    manifests = results(study, "compressed/tiny/*/20/seed0/manifest.json")
    assert {path.parts[-4] for path in manifests} == {"svd", "lord", "bolaco", "rankwise", "flap"}
    for path in manifests:
        manifest = json.loads(path.read_text())
        assert 0.75 < manifest["kept"]["linears"] <= 0.80, path
        model = load_checkpoint(path.parent / "checkpoint", torch.float32)
        indices = sum(tensor.numel() for name, tensor in model.state_dict().items() if name.endswith(".rows"))
        assert manifest["parameters"]["total"] == model.num_parameters() + indices


def test_post_training_keeps_the_ranks_and_changes_the_factors(study: Path) -> None:
    before = load_checkpoint(study / "results/tiny/compressed/tiny/bolaco/20/seed0/checkpoint", torch.float32)
    after = load_checkpoint(study / "results/tiny/tuned/tiny/bolaco/20/scales/seed0/checkpoint", torch.float32)
    assert before.config.recipe == after.config.recipe
    changed = {
        name.rpartition(".")[0].rpartition(".")[2]
        for name, tensor in before.state_dict().items()
        if not torch.equal(tensor, after.state_dict()[name])
    }
    assert changed == {"up"}


AFTER_A_CHECKPOINT = {"evaluate_perplexity", "evaluate_zero_shot", "evaluate_cost", "evaluate_generation"}
PAPER = {"make_table", "write_provenance", "write_report"}


@pytest.mark.parametrize(
    ("section", "change", "expected"),
    [
        ("cache", "elsewhere", set()),
        ("models", {"tiny": {"license": "MIT"}}, {"write_provenance", "write_report"}),
        ("tables", {"table_8": {"title": "Other words"}}, PAPER),
        ("tuning", {"scales": {"learning_rate": 0.5}}, {"post_train", "draw_figure"} | AFTER_A_CHECKPOINT | PAPER),
        (
            "search",
            {"bo": {"evaluations": 7}},
            {"search_allocation", "compress_model", "post_train", "draw_figure"} | AFTER_A_CHECKPOINT | PAPER,
        ),
        (
            "covariance",
            {"pooled": {"groups": 2}},
            {"compute_bases", "select_validation", "measure_sensitivity", "search_allocation", "compress_model"}
            | {"post_train", "draw_figure"}
            | AFTER_A_CHECKPOINT
            | PAPER,
        ),
    ],
)
def test_only_what_a_change_decides_runs_again(
    finished: Study, section: str, change: str | dict[str, dict[str, object]], expected: set[str]
) -> None:
    path = finished.folder / "tiny.yaml"
    before = path.read_text()
    changed = yaml.safe_load(before)
    if isinstance(change, str):
        changed[section] = change
    else:
        for preset, values in change.items():
            changed[section][preset] |= values
    try:
        path.write_text(yaml.safe_dump(changed, sort_keys=False))
        plan = finished.snakemake("--dry-run", "--quiet", "rules")
    finally:
        path.write_text(before)
    listed = {line.split()[0] for line in plan.splitlines() if len(line.split()) == 2 and line.split()[1].isdigit()}
    assert listed - {"all", "total"} == expected


def test_a_changed_source_file_is_fetched_again(finished: Study) -> None:
    source = finished.folder / "test-a.jsonl"
    before, times = source.read_text(), source.stat()
    try:
        source.write_text(before.replace("river", "brook"))
        plan = finished.snakemake("--dry-run", "--quiet", "rules")
    finally:
        source.write_text(before)
        os.utime(source, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert "fetch_corpus" in plan
    assert "evaluate_perplexity" in plan
    assert "fetch_model" not in plan


def test_a_search_killed_twice_finds_the_allocation_of_an_undisturbed_one(finished: Study) -> None:
    study, target = finished.folder, f"{ALLOCATION}/allocation.json"
    folder = study / ALLOCATION
    allocation, trials = json.loads((folder / "allocation.json").read_text()), (folder / "trials.csv").read_bytes()
    for path in folder.iterdir():
        path.unlink()
    for evaluations in (2, 4):
        finished.kill(target, partial(enough, study, evaluations))
        assert not (folder / "allocation.json").exists()
        finished.snakemake("--unlock")
    assert "of 6 evaluations were finished before" in finished.snakemake(target)
    again = json.loads((folder / "allocation.json").read_text())
    measured = ("seconds", "environment")
    assert {k: v for k, v in again.items() if k not in measured} == {
        k: v for k, v in allocation.items() if k not in measured
    }
    assert (folder / "trials.csv").read_bytes() == trials
    assert not [path for path in results(study, "**/*") if path.name.endswith(".tmp")]


def enough(study: Path, evaluations: int) -> bool:
    """Whether so many trials of the unfinished search are on disk."""
    with suppress(FileNotFoundError):  # it ended meanwhile
        logs = results(study, ".state/search_allocation-*/trials.csv")
        return bool(logs) and logs[0].read_bytes().count(b"\n") > evaluations  # a line of names stands before them
    return False


@pytest.mark.parametrize("forks", [True, False])
def test_the_command_that_a_user_types_makes_the_same(finished: Study, forks: bool) -> None:
    """From a search to a table, each stage a fork of the run's own server, or in an interpreter of its own."""
    if forks and not forks_are_safe():
        pytest.skip("a process with torch may be forked on Linux without drivers of GPUs only")
    run = finished.folder / "results/tiny"
    made = [run / "tables/table_8.csv", *sorted((run / "compressed/tiny/bolaco").rglob("*.safetensors"))]
    before = [path.read_bytes() for path in made]
    assert len(before) == 2
    for lost in (run / "allocation/tiny/bolaco", run / "compressed/tiny/bolaco"):
        shutil.rmtree(lost)
    made[0].unlink()
    finished.type_command("results/tiny/tables/table_8.csv", **({} if forks else {SERVER: ":"}))
    assert [path.read_bytes() for path in made] == before
    for rule in ("search_allocation", "compress_model"):
        (log,) = (run / "logs" / rule).rglob("tiny/bolaco/**/*.log")
        assert (", a fork of process " in log.read_text()) == forks
