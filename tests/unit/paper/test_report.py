"""Report, provenance and the summary in the terminal."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from lowrank.config.outputs import Row, RowTable
from lowrank.config.study import Study
from lowrank.config.suites import ZeroShotSuite
from lowrank.errors import RankwiseError
from lowrank.files import digest_of, sha256_file, write_json, write_text
from lowrank.paper.provenance import describe_run
from lowrank.paper.render import to_csv, to_html
from lowrank.paper.report import render_report
from lowrank.paper.show import main, show
from lowrank.paper.tables import build_table
from tests.unit.paper.paper_samples import (
    SHAPE,
    TASKS,
    context,
    dense_results,
    manifest,
    row_results,
    sensitivity,
    zero_shot,
)


@pytest.fixture
def config() -> dict[str, Any]:
    """A study with one table, all defaults filled in."""
    rows = [{"model": "tiny", "method": "dense"}]
    study = Study.model_validate(
        {
            "run": "sample",
            "smoke": True,
            "models": {"tiny": {"source": {"path": "m"}, "shape": SHAPE.plain()}},
            "methods": {"dense": {"kind": "dense"}},
            "suites": {
                "cost": {"kind": "cost"},
                "zs": {"kind": "zero-shot", "tasks": TASKS, "limit": 20},
                "ppl": {"kind": "perplexity", "corpora": ["wiki_test", "speeches"], "length": 256},
            },
            "tables": {
                "costs": {"kind": "statistics", "title": "Costs", "suites": ["cost"], "rows": rows},
                "table_1": {"kind": "accuracy", "title": "Main table", "suites": ["zs", "ppl"], "rows": rows},
            },
        }
    )
    return study.plain()


@pytest.fixture
def run(tmp_path: Path, config: dict[str, Any]) -> Path:
    """The folder of a finished run."""
    folder = tmp_path / "results" / "sample"
    row = Row(model="tiny", method="lord", ratio=20)
    write_json(folder / "evaluation" / "a" / "zs.json", zero_shot(row, 0.5))
    write_json(folder / "compressed" / "manifest.json", manifest(row, 20))
    write_json(folder / "sensitivity.json", sensitivity())
    rows = [dense_results(), row_results(label="Bolaco 5×1 with a rather long label"), row_results(ratio=30)]
    table = build_table(RowTable(kind="accuracy", title="Main table", rows=[r.row for r in rows]), rows, context())
    write_text(folder / "tables" / "table_1.csv", to_csv(table))
    write_text(folder / "tables" / "table_1.html", to_html(table, "table_1"))
    (folder / "figures").mkdir()
    for kind in ("png", "pdf", "csv"):
        (folder / "figures" / f"figure_1.{kind}").write_bytes(b"\x89PNG")
    shown = [folder / "tables" / "table_1.csv", *map(Path, settings(folder)["evidence"])]
    write_json(folder / "provenance.json", describe_run("sample", config, shown, folder))
    return folder


def settings(folder: Path) -> dict[str, Any]:
    tables, figures = folder / "tables", folder / "figures"
    return {
        "run": "sample",
        "smoke": True,
        "seeds": [0, 1],
        "models": {"tiny": {"source": {"path": "<models>/tiny"}, "license": "Apache-2.0", "shape": SHAPE.plain()}},
        "presets": {"methods": {"lord": {"kind": "lord"}}, "search": {}},
        "tables": {"table_1": {"title": "x", "html": str(tables / "table_1.html"), "csv": str(tables / "table_1.csv")}},
        "figures": {
            "figure_1": {"title": "One & two", **{k: str(figures / f"figure_1.{k}") for k in ("png", "pdf", "csv")}}
        },
        "evidence": [
            str(folder / name) for name in ("evaluation/a/zs.json", "compressed/manifest.json", "sensitivity.json")
        ],
    }


def rendered(folder: Path) -> str:
    return render_report(settings(folder), json.loads((folder / "provenance.json").read_text()), folder / "report.html")


def test_the_report_stands_alone_and_its_links_lead_to_files(run: Path) -> None:
    html = rendered(run)
    assert not re.search(r"(?:src|href)=\"(?:https?:)?//", html)
    assert 'src="data:image/png;base64,' in html
    links = {link for link in re.findall(r'href="([^"#]+)"', html) if "ppl.json" not in link}
    assert {"evaluation/a/zs.json", "tables/table_1.csv", "figures/figure_1.pdf"} <= links
    assert all((run / link).is_file() for link in links)


def test_a_damaged_result_is_named(run: Path) -> None:
    (run / "evaluation/a/zs.json").write_text("{")
    with pytest.raises(RankwiseError, match=r"zs\.json"):
        rendered(run)


def test_the_report_says_what_was_run(run: Path) -> None:
    html = rendered(run)
    assert "Smoke run, not a measurement: texts, searches and training are short." in html
    assert "Compression of tiny: 1 method, on cpu" in html
    assert "Seeds: 0, 1." in html
    assert "Apache-2.0" in html
    assert "path: &lt;models&gt;/tiny" in html, "what the config says is escaped"
    assert "One &amp; two" in html
    assert "kind: lord" in html
    assert "<summary>search</summary>" not in html, "an empty section is left out"
    assert '<th scope="row" class="left fixed">dense</th>' in html, "tables are embedded, not escaped"
    assert digest_of(json.loads((run / "provenance.json").read_text())["config"]) in html


def test_each_row_links_to_its_evaluations(run: Path) -> None:
    html = rendered(run)
    start = html.index("tiny, lord, 30 % removed")
    assert 'href="evaluation/a/zs.json"' in html[start : start + 300]


def test_every_result_is_listed_with_what_it_is_about(run: Path) -> None:
    html = rendered(run)
    assert "3 files, 23 s of work" in html
    for name, kind in (("zs.json", "zero-shot"), ("manifest.json", "checkpoint"), ("sensitivity.json", "sensitivity")):
        assert f"{name}</a> ({kind})" in html
    assert "<tr><td>tiny</td><td>–</td>" in html, "a study of sensitivity has no method"


def test_a_missing_figure_is_named(run: Path) -> None:
    (run / "figures" / "figure_1.png").unlink()
    with pytest.raises(RankwiseError, match=r"figure_1\.png: cannot be read"):
        rendered(run)


def test_the_report_is_deterministic(run: Path) -> None:
    assert rendered(run) == rendered(run)


# --- provenance -------------------------------------------------------------------------------------------------


def test_provenance_records_config_versions_and_checksums_without_a_time(run: Path, config: dict[str, Any]) -> None:
    table = run / "tables" / "table_1.csv"
    described = describe_run("sample", config, [table, table], run)
    assert described == describe_run("sample", config, [table], run)
    assert described["artefacts"] == {"tables/table_1.csv": sha256_file(table)}
    assert described["config_digest"] == digest_of(config)
    assert described["versions"]["pandas"] != "absent"
    assert str(run) not in json.dumps(described), "no path of this machine"


def test_a_missing_artefact_is_named(run: Path) -> None:
    with pytest.raises(RankwiseError, match=r"gone\.csv: missing"):
        describe_run("sample", {}, [run / "gone.csv"], run)


# --- show -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [100, 120])
def test_the_main_table_fits_the_terminal(run: Path, width: int) -> None:
    console = Console(width=width, record=True, file=io.StringIO())
    show(run, console)
    text = console.export_text()
    assert max(len(line.rstrip()) for line in text.split("report:")[0].split("tables:")[0].splitlines()) <= width
    assert "Main table" in text
    assert "Smoke run: first 20 documents per task, not a measurement." in text
    assert re.search(r"20 %.*80\.0 %.*50\.0.*53\.0 ± 1\.2", text)
    assert "20.00 ± 0.40" in text
    assert "…" not in text, "nothing is cut off"


def test_marked_is_what_tables_have_in_bold_and_the_page_says_how_to_read_it(run: Path) -> None:
    rows = [dense_results(), row_results(0.5), row_results(0.51, method="svd", label="better")]
    for task in rows[2].evaluations["zs"][0]["tasks"].values():
        task["scores"] = task["scores"][::-1]  # its accuracy is higher, but not told apart by these documents
    table = build_table(RowTable(kind="accuracy", title="Main table", rows=[r.row for r in rows]), rows, context())
    write_text(run / "tables/table_1.csv", to_csv(table))
    console = Console(width=120, record=True, file=io.StringIO())
    show(run, console)
    text = console.export_text()
    (perplexity, accuracy) = [line for line in text.splitlines() if "better" in line and "%" in line]
    assert "19.61 ± 0.39 *  39.22 ± 0.39 *" in perplexity
    assert "54.0 ± 1.2" in accuracy
    assert "*" not in accuracy
    assert "*" not in next(line for line in text.splitlines() if "lord" in line)
    told = " ".join(text.split())
    assert "lower is better" in told
    assert "percent of questions answered right; higher is better" in told
    assert "*: the best compressed value of a model and ratio, where it is better than each other by more than" in told


def test_a_label_that_reads_like_a_missing_value_is_shown(run: Path) -> None:
    rows = [dense_results(), row_results(label="NA")]
    table = build_table(RowTable(kind="accuracy", title="Main table", rows=[r.row for r in rows]), rows, context())
    write_text(run / "tables/table_1.csv", to_csv(table))
    console = Console(width=120, record=True, file=io.StringIO())
    show(run, console)
    assert re.search(r"20 % +80\.0 % +NA ", console.export_text())


def test_an_accuracy_of_one_task_stands_there_once(run: Path, config: dict[str, Any]) -> None:
    suite = {"kind": "zero-shot", "tasks": {"arc_easy": "acc"}, "limit": 20}
    config["suites"]["zs"] = suite
    config["tables"]["table_1"]["suites"] = ["zs"]
    write_json(run / "provenance.json", describe_run("sample", config, [], run))
    rows = [dense_results(), row_results()]
    asked = RowTable(kind="accuracy", title="Main table", rows=[r.row for r in rows])
    table = build_table(asked, rows, context(suites={"zs": ZeroShotSuite.model_validate(suite)}))
    write_text(run / "tables/table_1.csv", to_csv(table))
    console = Console(width=120, record=True, file=io.StringIO())
    show(run, console)
    text = console.export_text()
    assert "Average" not in text
    assert "54.0 ± 1.4" in text


def test_show_says_where_everything_lies(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run / "report.html").write_text("x")
    assert main([str(run)]) == 0
    shown = capsys.readouterr().out
    for name in ("report.html", "tables", "figures", "provenance.json"):
        assert str(run / name) in shown.replace("\n", "")


def test_show_without_a_finished_run_gives_one_message(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for named, meant in ((str(tmp_path), tmp_path), ("~/gone", tmp_path / "gone")):
        assert main([named]) == 1
        assert capsys.readouterr().err == (
            f"{meant}: holds no finished run (provenance.json is missing). Run the workflow first.\n"
        )
    assert main([]) == 2
