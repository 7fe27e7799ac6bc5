"""`use:`: a config with presets of another file, what of them it gets, and where its errors lie."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from lowrank.config.__main__ import main
from lowrank.config.load import check_study, load_study, read_config
from lowrank.config.references import references
from lowrank.config.use import SECTION_OF, SHIPPED, with_presets
from lowrank.errors import RankwiseError
from lowrank.layout import Layout
from tests import tiny

PRESETS = """\
corpora:
  calibration: {source: {path: nowhere}, documents: [0, 5]}
  other: {source: {path: elsewhere}}
calibration:
  c8: {corpora: [calibration], windows: 8, length: 64}
  c9: {corpora: [other], windows: 9, length: 64}
covariance:
  naive: {estimator: naive}
methods:
  dense: {kind: dense}
  svd: {kind: svd}
  lord:
    kind: lord
    calibration: c8
    covariance: naive
  broken: {kind: lord, calibration: c9}
suites:
  cost: {kind: cost}
"""


def write(folder: Path, presets: str = PRESETS, **own: Any) -> Path:
    """A study of one table in a folder, and its presets beside it."""
    (folder / "presets.yaml").write_text(presets)
    row = {"model": "m", "method": "lord", "ratio": 20, "tolerance": 4}
    study = {
        "use": "presets.yaml",
        "run": "short",
        "models": {"m": {"source": {"path": "model"}, "shape": tiny.shape("llama")}},
        "tables": {"costs": {"kind": "statistics", "title": "Costs", "suites": ["cost"], "rows": [row]}},
    }
    path = folder / "study.yaml"
    path.write_text(yaml.safe_dump(study | own, sort_keys=False))
    return path


def test_a_study_gets_the_presets_that_it_leads_to(tmp_path: Path) -> None:
    study = load_study(write(tmp_path))
    assert list(study.methods) == ["dense", "lord"], "the dense model is drawn unasked"
    assert list(study.corpora) == ["calibration"]
    assert study.corpora["calibration"].documents == (0, 5)
    assert list(study.calibration) == ["c8"]
    fetched = [name for name in Layout(study).fetched() if "corpora" in name]
    assert fetched == ["results/short/corpora/calibration.json"]


def test_it_is_the_study_that_has_them_written_out(tmp_path: Path) -> None:
    path = write(tmp_path)
    raw = yaml.safe_load(path.read_text())
    del raw["use"]
    found = yaml.safe_load(PRESETS)
    names = {"corpora": ["calibration"], "calibration": ["c8"], "methods": ["dense", "lord"]}
    whole = {key: {name: found[key][name] for name in names.get(key, found[key])} for key in found}
    assert load_study(path) == check_study(raw | whole)
    assert "use" not in load_study(path).plain()


def test_an_entry_of_the_study_counts_whole(tmp_path: Path) -> None:
    own = {"calibration": {"source": {"path": "mine.txt"}}}
    study = load_study(write(tmp_path, corpora=own, calibration={"c10": {"corpora": ["other"]} | WINDOWS}))
    assert study.corpora["calibration"].documents == (0, None), "nothing of the preset is left"
    assert study.corpora["other"].source.path == "elsewhere", "named by an entry of the study that nothing asks for"
    assert sorted(study.calibration) == ["c10", "c8"]


WINDOWS = {"windows": 8, "length": 64}


def test_presets_lie_beside_the_config_or_with_those_that_ship(tmp_path: Path) -> None:
    use = {"use": "presets/default.yaml"}
    beside = tmp_path / "presets/default.yaml"
    found, _ = with_presets({**use, "x": {"y": {"calibration": "c4-32"}}}, [tmp_path / "a.yaml"])
    assert "c4-32" in found["calibration"]
    beside.parent.mkdir()
    beside.write_text("covariance: {mine: {estimator: naive}}\n")
    found, _ = with_presets({**use, "x": {"y": {"covariance": "mine"}}}, [tmp_path / "a.yaml"])
    assert found["covariance"] == {"mine": {"estimator": "naive"}}


def test_rows_of_published_values_name_no_preset(tmp_path: Path) -> None:
    published = {"file": "table_1", "model": "m", "method": "broken", "ratio": 20}
    row = {"model": "m", "method": "svd", "ratio": 20, "published": published}
    table = {"kind": "statistics", "title": "Costs", "suites": ["cost"], "rows": [row]}
    assert sorted(read_config(write(tmp_path, tables={"t": table}))["methods"]) == ["dense", "svd"]


@pytest.mark.parametrize("name", ["quickstart", "mini-paper", "paper"])
def test_every_reference_of_a_config_is_followed(name: str) -> None:
    """All entries that a study leads to are found by the keys that name them, as `references` finds them by type."""
    study = load_study(SHIPPED / f"{name}.yaml")
    for place, section, _ in references(study):
        keys = [key.partition("[")[0] for key in place.split(".")]
        assert section in {SECTION_OF.get(keys[-1]), SECTION_OF.get(keys[-2])}, place


# --- errors ---


def errors(path: Path) -> list[str]:
    with pytest.raises(RankwiseError) as caught:
        load_study(path)
    return str(caught.value).split("\n")


def line_of(path: Path, text: str) -> int:
    return 1 + next(index for index, line in enumerate(path.read_text().splitlines()) if text in line)


def test_an_error_names_the_file_and_line_of_its_key(tmp_path: Path) -> None:
    presets = PRESETS.replace("    covariance: naive\n", "    covariance: naiv\n").replace(
        "length", "lenght: 3, length", 1
    )
    model = {"source": {"path": "model"}, "shape": tiny.shape("llama")}
    path = write(tmp_path, presets, models={"m": model, "n": model | {"max_length": 0}})
    head, *lines = errors(path)
    other = tmp_path / "presets.yaml"
    assert head == f"{path} has 3 errors:"
    assert lines == [
        f"  line {line_of(path, 'max_length')}: models.n.max_length: must be a whole number of at least 1, not 0",
        f"  {other}, line {line_of(other, 'lenght')}: calibration.c8.lenght: unknown key - did you mean 'length'?",
        f"  {other}, line {line_of(other, 'covariance: naiv')}: methods.lord.covariance: 'naiv' is not in `covariance`"
        " - did you mean 'naive'?",
    ]


def test_a_missing_key_is_missed_where_its_entry_stands(tmp_path: Path) -> None:
    shape = {key: value for key, value in tiny.shape("llama").items() if key != "layers"}
    path = write(tmp_path, models={"m": {"source": {"path": "model"}, "shape": shape}})
    (line,) = errors(path)[1:]
    assert line.startswith(f"  line {line_of(path, 'shape:')}: models.m.shape.layers: missing")


def test_presets_that_nothing_leads_to_give_no_errors(tmp_path: Path) -> None:
    presets = PRESETS + "search:\n  wrong: {evaluations: none}\n"
    load_study(write(tmp_path, presets))
    searching = {"kind": "bolaco", "calibration": "c8", "covariance": "naive", "validation": "none", "search": "wrong"}
    assert "search.wrong.evaluations" in "".join(errors(write(tmp_path, presets, methods={"mine": searching})))


@pytest.mark.parametrize(
    ("presets", "use", "message"),
    [
        (PRESETS, "preset.yaml", "line 1: use: there is no preset.yaml in {folder} or {shipped} (shipped: presets/"),
        (PRESETS, 5, "line 1: use: must be the path of a file of presets, not 5"),
        ("seeds: [1]\n", "presets.yaml", "{folder}/presets.yaml, line 1: seeds: cannot stand in a file of presets"),
        ("run: x\nuse: y\n", "presets.yaml", "{folder}/presets.yaml, line 1: run: cannot stand in a file of presets"),
        ("a: [\n", "presets.yaml", "{folder}/presets.yaml, line 2, column 1: no valid YAML"),
    ],
)
def test_what_is_no_file_of_presets_is_refused(tmp_path: Path, presets: str, use: object, message: str) -> None:
    path = write(tmp_path, presets, use=use)
    head, line = errors(path)
    assert head == f"{path} has 1 error:"
    assert line.startswith("  " + message.format(folder=tmp_path, shipped=SHIPPED))


def test_what_lies_beside_the_config_is_missed_with_its_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    published = {"file": "table_1", "model": "llama-2-7b", "method": "lrod", "ratio": 20}
    row = {"model": "m", "method": "lord", "ratio": 20, "tolerance": 2, "published": published}
    path = write(tmp_path, tables={"t": {"kind": "statistics", "title": "T", "suites": ["cost"], "rows": [row]}})
    assert main(["check", str(path)]) == 1
    assert f"line {line_of(path, 'lrod')}: tables.t.rows[0].published.method: 'lrod'" in capsys.readouterr().err


# --- Snakemake ---


def test_snakemake_sees_the_presets_and_their_errors(tmp_path: Path) -> None:
    def dry_run() -> str:
        command = [sys.executable, "-m", "snakemake", "-n", "--quiet", "rules", "--configfile", str(path)]
        run = subprocess.run(
            [*command, "--directory", str(tmp_path)], cwd=SHIPPED.parent, capture_output=True, text=True, check=False
        )
        return run.stdout + run.stderr

    path = write(tmp_path)
    said = dry_run()
    jobs = dict(line.split() for line in said.split("total")[0].splitlines() if line.split()[1:2] == ["1"])
    assert jobs.keys() >= {"compute_bases", "compress_model", "evaluate_cost", "fetch_corpus"}, said
    (tmp_path / "presets.yaml").write_text(PRESETS.replace("windows: 8", "windows: 8, lenght: 3"))
    said = dry_run()
    assert f"{tmp_path}/presets.yaml, line 5: calibration.c8.lenght: unknown key - did you mean 'length'?" in said
    assert "Traceback" not in said


def test_the_quickstart_has_what_it_leads_to_and_no_other_presets() -> None:
    plain = load_study(SHIPPED / "quickstart.yaml").plain()
    assert plain["calibration"]["c4-32"]["gradient_windows"] == 12
    assert {name: sorted(plain[name]) for name in ("covariance", "search", "methods", "corpora")} == {
        "covariance": ["fisher", "pooled-8"],
        "search": ["bo-10"],
        "methods": ["bolaco-5x1", "dense", "rankwise-neurons", "svd"],
        "corpora": ["c4-calibration", "c4-test", "wikipedia-test", "wikipedia-validation"],
    }
