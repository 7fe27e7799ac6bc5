"""The plan of a study: its jobs, its sums, and what it says of what does not fit."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from lowrank.cluster import plan as plan_module
from lowrank.cluster.dealing import Dealing
from lowrank.cluster.needs import GIB
from lowrank.cluster.plan import make_plan, remarks
from lowrank.cluster.planned_jobs import Job, planned_jobs
from lowrank.cluster.resources import Estimator
from lowrank.config.load import check_study, load_study, read_config
from lowrank.config.study import Study
from tests import tiny_study

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def paper() -> Study:
    return load_study(ROOT / "config/paper.yaml")


@pytest.fixture(scope="module")
def small() -> Study:
    return check_study(tiny_study.config(Path("nowhere")))


def test_each_job_stands_after_those_that_it_waits_for(small: Study) -> None:
    seen: set[Job] = set()
    for job, after in planned_jobs(small).items():
        assert seen.issuperset(after), job
        seen.add(job)


def test_a_chain_from_the_model_to_the_report(small: Study) -> None:
    jobs = planned_jobs(small)
    waits: set[Job] = set()
    pending = [Job.of("write_report")]
    while pending:
        job = pending.pop()
        waits.add(job)
        pending += [other for other in jobs[job] if other not in waits]
    assert waits == set(jobs)


def test_a_tuned_row_waits_for_training_and_the_row_without_it(small: Study) -> None:
    jobs = planned_jobs(small)
    row = {"model": "tiny", "method": "bolaco", "ratio": 20, "seed": 0}
    tuned = jobs[Job.of("evaluate_perplexity", tuning="scales", suite="held-out", **row)]
    assert tuned[0] == Job.of("post_train", tuning="scales", **row)
    assert Job.of("compress_model", **row) in jobs[tuned[0]]
    assert Job.of("fetch_instructions", instructions="tiny") in jobs[tuned[0]]


def test_a_distilled_row_waits_for_the_dense_model_and_windows_besides() -> None:
    raw = tiny_study.config(Path("nowhere"))
    raw["tuning"]["distilled"] = {"kind": "feature-distillation", "calibration": "c8", "validation_windows": 2}
    raw["tables"]["table_7"]["rows"][1] |= {"tuning": "distilled"}
    row = {"model": "tiny", "method": "svd", "ratio": 20, "seed": 0}
    jobs = planned_jobs(check_study(raw))
    job = Job.of("distil_features", tuning="distilled", **row)
    assert job in jobs[Job.of("evaluate_cost", tuning="distilled", suite="cost", **row)]
    assert jobs[job] == [
        Job.of("compress_model", **row),
        Job.of("fetch_model", model="tiny"),
        Job.of("sample_calibration", model="tiny", calibration="c8"),
    ]


def test_what_shows_tested_text_waits_until_it_was_compared(small: Study) -> None:
    jobs, compared = planned_jobs(small), Job.of("compare_texts")
    names = ("calibration", "test-a", "test-b", "test-c", "validation")
    assert jobs[compared] == [Job.of("fetch_corpus", corpus=name) for name in names]
    waiting = {next(iter(job.wildcards.values()), job.rule) for job, after in jobs.items() if compared in after}
    assert waiting == {"table_1", "table_2", "differences", "figure_3", "figure_4", "figure_5"}


def test_without_tested_text_nothing_is_compared() -> None:
    raw = tiny_study.config(Path("nowhere"))
    raw["tables"] = {name: raw["tables"][name] for name in ("table_7", "table_8")}
    raw["figures"] = {name: raw["figures"][name] for name in ("figure_1", "figure_6")}
    assert Job.of("compare_texts") not in planned_jobs(check_study(raw))


def test_seeds_repeat_what_is_random_and_nothing_else() -> None:
    raw = tiny_study.config(Path("nowhere"))
    once = planned_jobs(check_study(raw))
    thrice = planned_jobs(check_study(raw | {"seeds": [0, 1, 2]}))
    more = {job.rule for job in thrice if job not in once}
    assert more == {
        *("search_allocation", "compress_model", "post_train"),
        *("evaluate_perplexity", "evaluate_zero_shot", "evaluate_cost", "evaluate_generation"),
    }
    added = {job.wildcards["method"] for job in thrice if job not in once}
    assert added == {"bolaco", "transferred"}


def test_bases_that_know_the_loss_wait_for_gradients() -> None:
    raw = tiny_study.config(Path("nowhere"))
    raw["figures"]["predicted"] = {
        **{"kind": "predicted-loss", "title": "Predicted", "model": "tiny", "calibration": "c8"},
        **{"covariance": ["fisher"], "corpus": "validation", "windows": 2, "length": 64},
    }
    study = check_study(raw)
    jobs, of = planned_jobs(study), {"model": "tiny", "calibration": "c8"}
    measured = Job.of("measure_truncations", figure="predicted", covariance="fisher")
    assert measured in jobs[Job.of("draw_figure", figure="predicted")]
    bases = Job.of("compute_bases", covariance="fisher", **of)
    assert bases in jobs[measured]
    assert {Job.of("collect_statistics", **of), Job.of("collect_gradients", **of)} <= set(jobs[bases])
    assert Job.of("collect_gradients", **of) not in jobs[Job.of("compute_bases", covariance="pooled", **of)]
    models = {entry.model for entry in make_plan(study).entries if entry.rule == "measure_truncations"}
    assert models == {"tiny"}


def test_neurons_are_eliminated_once_for_all_ratios_and_all_who_agree() -> None:
    raw = tiny_study.config(Path("nowhere"))
    preset = raw["methods"]["rankwise"]
    more = {"without-influence": {"influence": False}, "sixteens": {"multiple": 16}, "plain": {"mlp": "neurons"}}
    more |= {"one-width": {"mlp": "neurons", "multiple": 32, "widths": "one"}, "pairs": {"mlp": "pairs"}}
    raw["methods"] |= {name: preset | change for name, change in more.items()}
    row = {"model": "tiny", "tolerance": 9}
    raw["tables"]["table_8"]["rows"] += [{**row, "method": "rankwise", "ratio": ratio} for ratio in (20, 30)]
    raw["tables"]["table_8"]["rows"] += [{**row, "method": method, "ratio": 20} for method in more]
    jobs = planned_jobs(check_study(raw))
    of = {"model": "tiny", "calibration": "c8", "covariance": "fisher"}
    plain, eights, sixteens = (Job.of("eliminate_neurons", multiple=name, **of) for name in ("any", 8, 16))
    assert {job for job in jobs if job.rule == "eliminate_neurons"} == {plain, eights, sixteens}
    collected = [Job.of(f"collect_{what}", model="tiny", calibration="c8") for what in ("statistics", "gradients")]
    assert jobs[plain] == [Job.of("fetch_model", model="tiny"), *collected]
    assert jobs[eights] == jobs[sixteens] == [*jobs[plain], plain]

    def reads(method: str, ratio: int = 20) -> set[Job]:
        after = jobs[Job.of("compress_model", model="tiny", method=method, ratio=ratio, seed=0)]
        return {job for job in after if job.rule == "eliminate_neurons"}

    assert reads("rankwise") == reads("rankwise", 30) == reads("without-influence") == {eights}
    assert reads("sixteens") == {sixteens}
    assert reads("plain") == reads("one-width") == {plain}
    assert not reads("pairs")


def test_windows_that_are_all_kept_wait_for_no_bases(small: Study) -> None:
    raw = tiny_study.config(Path("nowhere"))
    raw["validation"]["top3"]["select"] = {"strategy": "all"}
    selected, bases = (
        Job.of("select_validation", model="tiny", validation="top3"),
        Job.of("compute_bases", model="tiny", calibration="c8", covariance="pooled"),
    )
    assert planned_jobs(check_study(raw))[selected] == [
        Job.of("fetch_model", model="tiny"),
        Job.of("fetch_corpus", corpus="validation"),
    ]
    assert bases in planned_jobs(small)[selected]


def test_the_sums_are_those_of_the_jobs(paper: Study) -> None:
    plan, estimator = make_plan(paper), Estimator(paper)
    needs = [estimator.need(job.rule, job.wildcards) for job in planned_jobs(paper)]
    assert plan.jobs == len(needs)
    assert plan.gpu_hours == pytest.approx(sum(need.seconds(1, 8) for need in needs if need.gpu) / 3600)
    disk = sum(entry.disk for entry in plan.entries)
    assert disk + sum(plan.given_up) == pytest.approx(sum(need.disk for need in needs))
    assert plan.given_up == sorted(plan.given_up, reverse=True)
    assert plan.disk == disk + max(need.scratch for need in needs) + sum(plan.given_up[:8])
    assert len(plan.given_up) == sum(job.rule == "give_up_checkpoint" for job in planned_jobs(paper)) > 8
    assert max(entry.gpu for entry in plan.entries) == max(need.gpu_bytes for need in needs)
    assert max(entry.host for entry in plan.entries) == max(need.host_bytes(1 if need.gpu else 0) for need in needs)


def test_several_gpus_shorten_only_what_is_shared(paper: Study) -> None:
    one, four = (
        {(entry.rule, entry.model): entry for entry in make_plan(paper, Dealing(gpus)).entries} for gpus in (1, 4)
    )
    for key, entry in one.items():
        assert four[key].gpu == entry.gpu
        if key[0] in ("search_allocation", "compute_bases"):
            assert four[key] == entry
        if key[0] == "collect_statistics":
            assert four[key].host > entry.host  # a process each, which loads the model
            assert entry.gpu_hours < four[key].gpu_hours < 4 * entry.gpu_hours  # loading is not shared


def test_without_gpus_everything_lies_in_main_memory(paper: Study) -> None:
    plan = make_plan(paper, Dealing(0))
    assert plan.gpu_hours == 0
    assert all(entry.gpu == 0 for entry in plan.entries)
    search = next(entry for entry in plan.entries if (entry.rule, entry.model) == ("search_allocation", "llama-2-13b"))
    assert search.host > 48 * GIB
    assert search.cpu_hours > 1000


def test_the_longest_chain_is_one_that_can_be_walked(paper: Study) -> None:
    jobs, plan = planned_jobs(paper), make_plan(paper)
    assert all(before in jobs[job] for before, job in zip(plan.chain, plan.chain[1:], strict=False))
    assert {job.wildcards.get("model") for job in plan.chain} <= {
        "llama-2-13b",
        None,
    }  # the largest, with post-training
    assert plan.chain_hours < plan.gpu_hours


def chain_of(jobs: dict[str, list[str]], hours: dict[str, float]) -> list[str]:
    made = {Job.of(name): [Job.of(other) for other in after] for name, after in jobs.items()}
    chain = plan_module._longest_chain(made, {Job.of(name): value for name, value in hours.items()})
    return [job.rule for job in chain]


def test_the_longest_chain_of_a_small_graph() -> None:
    jobs = {"a": [], "b": [], "c": ["a", "b"], "d": ["a"], "e": ["c", "d"]}
    assert chain_of(jobs, {"a": 1, "b": 2, "c": 1, "d": 1, "e": 1}) == ["b", "c", "e"]
    assert chain_of(jobs, {"a": 1, "b": 2, "c": 1, "d": 9, "e": 1}) == ["a", "d", "e"]
    assert chain_of(jobs, {"a": 1, "b": 20, "c": 1, "d": 9, "e": 0.1}) == ["b", "c", "e"]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "lowrank.cluster.plan", *arguments],
        cwd=ROOT / "workflow_scripts",
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_command_prints_every_rule_and_the_total(paper: Study) -> None:
    shown = run(str(ROOT / "config/paper.yaml"))
    assert shown.returncode == 0, shown.stderr
    rules = {job.rule for job in planned_jobs(paper)} & set(Estimator(paper).rules)
    assert len(rules) > 10
    for rule in rules:
        assert re.search(rf"^│ {rule} ", shown.stdout, re.MULTILINE), rule
    total = next(line for line in shown.stdout.splitlines() if line.startswith("│ all "))
    plan = make_plan(paper)
    assert f" {plan.jobs} " in total
    assert f" {plan.gpu_hours:,.0f} " in total
    assert "longest chain" in shown.stdout
    assert "docs/cluster.md" in shown.stdout


def test_without_gpus_the_hours_are_those_of_processors() -> None:
    config = str(ROOT / "config/quickstart.yaml")
    shown = run(config, "--gpus-per-job", "0")
    assert shown.returncode == 0, shown.stderr
    header, total = (
        next(line for line in shown.stdout.splitlines() if line[1:].startswith(f" {word} ")) for word in ("rule", "all")
    )
    plan = make_plan(load_study(config), Dealing(0))
    assert [cell.strip() for cell in re.split("[┃│]", header)][8] == "hours"
    assert [cell.strip() for cell in re.split("[┃│]", total)][8] == f"{plan.cpu_hours:.1f}"
    compressed = next(line for line in shown.stdout.splitlines() if line.startswith("│ compress_model "))
    hours = next(entry.cpu_hours for entry in plan.entries if entry.rule == "compress_model")
    assert compressed.split("│")[8].strip() == f"{hours:.1f}" != "0.0"
    assert "for 8 threads of a processor" in " ".join(shown.stdout.split())
    assert "GPU hours" not in shown.stdout


def test_make_plan_takes_the_number_of_gpus_and_the_plan_says_so(tmp_path: Path) -> None:
    (tmp_path / ".installed").touch()
    given = ["plan", "CONFIG=config/quickstart.yaml", "GPUS=0", f"VENV={tmp_path}"]
    made = subprocess.run(
        ["make", "--no-print-directory", "--dry-run", "--old-file", f"{tmp_path}/.installed", *given],
        cwd=ROOT,
        env={name: value for name, value in os.environ.items() if not name.startswith("MAKE")},
        capture_output=True,
        text=True,
        check=True,
    )
    assert made.stdout.rstrip().endswith("lowrank.cluster.plan '--gpus-per-job=0' 'config/quickstart.yaml'")
    assert "make plan CONFIG=... GPUS=0" in " ".join(run(str(ROOT / "config/quickstart.yaml")).stdout.split())
    assert "must be a whole number or `auto`, not 'none'" in run("x.yaml", "--gpus-per-job=none").stderr


def write(folder: Path, **shape: Any) -> str:
    raw = read_config(ROOT / "config/quickstart.yaml")
    raw["models"]["smollm2-135m"]["shape"] |= shape
    raw["models"]["smollm2-135m"]["dtype"] = "float16"
    path = folder / "study.yaml"
    path.write_text(yaml.safe_dump(raw, sort_keys=False))
    return str(path)


LARGE = {"layers": 80, "hidden": 8192, "intermediate": 28672, "heads": 64, "kv_heads": 8, "head_dim": 128}


def test_what_no_gpu_holds_is_marked_and_says_what_helps(tmp_path: Path) -> None:
    path = write(tmp_path, **LARGE)
    shown = run(path, "--gpus-per-job", "1").stdout
    assert "GiB !" in shown
    assert re.search(
        r"! smollm2-135m: search_allocation needs 2\d\d GiB on a GPU.*`gpus_per_job: auto`", shown, re.DOTALL
    )
    assert not re.search("! smollm2-135m: (collect_statistics|compute_bases)", shown)
    assert "! smollm2" not in run(path, "--gpus-per-job", "1", "--gpu-memory", "400").stdout
    assert "! smollm2" not in run(path, "--gpus-per-job", "0").stdout


def test_nodes_with_too_little_main_memory_are_told(tmp_path: Path) -> None:
    path = write(tmp_path, **LARGE)
    found = " ".join(run(path, "--node-memory", "100").stdout.split())
    assert re.search(
        r"! smollm2-135m: evaluate_perplexity needs 1\d\d GiB of main memory \(.*100 \(`--node-memory`\)", found
    )
    assert "! smollm2-135m: compute_bases" not in found
    assert "--node-memory" not in run(path, "--node-memory", "1000").stdout


def test_by_itself_it_gives_each_rule_the_gpus_that_hold_the_model(tmp_path: Path) -> None:
    shown = run(write(tmp_path, **LARGE)).stdout
    gpus = {
        rule: int(count)
        for rule, count in re.findall(r"^│ (\w+) +│ smollm2-135m │ +\d+ │ +(\d+) │", shown, re.MULTILINE)
    }
    assert gpus["collect_statistics"] == gpus["compute_bases"] == 1
    assert gpus["search_allocation"] == gpus["select_validation"] == 4  # weights and bases: 128 GiB each
    assert gpus["evaluate_perplexity"] == 2
    assert re.search(
        r"One process has its model on several GPUs in .*, search_allocation, select_validation:",
        " ".join(shown.split()),
    )


def test_the_study_of_large_models_fits_nodes_of_eight_gpus() -> None:
    """Planned without network or GPU, from the shapes that the config states."""
    plan = make_plan(load_study(ROOT / "config/large.yaml"), Dealing(None, 80 * GIB, 8))
    assert {entry.model for entry in plan.entries if entry.rule == "compress_model"} == {"llama-3.1-70b", "qwen2.5-72b"}
    assert not [entry for entry in plan.entries if entry.unfit]
    assert max(entry.gpu for entry in plan.entries) <= 80 * GIB
    assert {entry.gpus for entry in plan.entries if entry.rule == "evaluate_zero_shot"} == {2}
    assert {entry.over for entry in plan.entries if entry.rule == "post_train"} == {1}  # ZeRO: a part in each process
    assert {entry.gpus for entry in plan.entries if entry.rule == "post_train"} == {8}


def test_the_page_says_what_the_plan_says_of_large_models() -> None:
    page = (ROOT / "docs/cluster.md").read_text(encoding="utf-8")
    table = page.partition("| rule | GPUs | fullest, GiB | main memory, GiB |\n|---|---|---|---|\n")[2].partition(
        "\n\n"
    )[0]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]
    plan, seen = make_plan(load_study(ROOT / "config/large.yaml"), Dealing(None, 80 * GIB, 8)), set()
    for name, *numbers in rows:
        pattern = re.sub(r"\\\*$", ".*", re.escape(name.split("`")[1]))
        mine = [entry for entry in plan.entries if re.fullmatch(pattern, entry.rule)]
        found = (max(e.gpus for e in mine), max(e.gpu for e in mine) / GIB, max(e.host for e in mine) / GIB)
        assert [float(number) for number in numbers] == pytest.approx(found, abs=1), name
        seen |= {entry.rule for entry in mine}
    assert seen == {entry.rule for entry in plan.entries if entry.gpus}


def test_layers_per_pass_decide_whether_statistics_fit(tmp_path: Path) -> None:
    study = load_study(write(tmp_path, layers=48, hidden=8192, intermediate=22016, heads=64, kv_heads=64, head_dim=128))
    of_statistics = [
        next(
            entry for entry in make_plan(study, collect_statistics=layers).entries if entry.rule == "collect_statistics"
        )
        for layers in (8, 1)
    ]
    assert of_statistics[0].gpu - of_statistics[1].gpu == pytest.approx(
        7 * (8 * (3 * 8192**2 + 22016**2) + 2 * (4 * 8192**2 + 3 * 8192 * 22016)), rel=0.01
    )


def test_a_config_may_lie_in_the_home_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert plan_module.main(["~/mine.yaml"]) == 1
    assert f"{tmp_path}/mine.yaml: there is no such config file" in capsys.readouterr().err


def test_a_wrong_config_is_said_as_everywhere(tmp_path: Path) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text("run: x\n")
    failed = run(str(path))
    assert failed.returncode == 1
    assert "bad.yaml has 3 errors" in failed.stderr
    assert "Traceback" not in failed.stderr


def test_jobs_without_a_line_are_counted_in_words(small: Study) -> None:
    plan = make_plan(small)
    light = {"fetch_corpus", "fetch_task", "fetch_instructions", "make_table", "draw_figure"}
    light |= {"compare_texts", "write_provenance", "write_report"}
    count = sum(job.rule in light for job in planned_jobs(small))
    assert next(iter(remarks(plan))).startswith(f"{count} jobs fetch or compare texts, write tables and")


def test_it_starts_fast_and_needs_neither_torch_nor_snakemake() -> None:
    heavy = ("torch", "snakemake", "transformers", "numpy")
    code = f"import sys, lowrank.cluster.plan; print([name for name in {heavy} if name in sys.modules])"
    shown = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT / "workflow_scripts", capture_output=True, text=True, check=True
    )
    assert shown.stdout == "[]\n"
