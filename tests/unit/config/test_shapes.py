"""`shape:` left out: read where the model is, and said where it is not."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from lowrank.config.__main__ import main
from lowrank.config.beside import check_beside
from lowrank.config.lines import Lines
from lowrank.config.load import check_study, load_study
from lowrank.config.shapes import MANIFEST
from lowrank.config.sources import FoundShape, Model
from lowrank.config.use import SHIPPED
from lowrank.config.yaml_file import read_yaml
from lowrank.errors import RankwiseError
from lowrank.files import write_json
from lowrank.layout import Layout
from lowrank.sources.models import fetch_model
from tests import tiny

HUB = {"hub": "somebody/model", "revision": "0" * 40}


def study(source: dict[str, Any], **model: Any) -> dict[str, Any]:
    """A study of one model whose shape it leaves out."""
    row = {"model": "m", "method": "svd", "ratio": 20, "tolerance": 4}
    return {
        "run": "short",
        "models": {"m": {"source": source, "max_length": 256} | model},
        "methods": {"svd": {"kind": "svd"}},
        "suites": {"cost": {"kind": "cost"}},
        "tables": {"costs": {"kind": "statistics", "title": "Costs", "suites": ["cost"], "rows": [row]}},
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with its tokenizer."""
    made = tmp_path_factory.mktemp("model")
    trained = tiny.tokenizer()
    tiny.model("llama-gqa", len(trained)).save_pretrained(made)
    trained.save_pretrained(made)
    return made


SHAPE = tiny.shape("llama-gqa", len(tiny.tokenizer()))


def test_the_shape_of_a_folder(folder: Path) -> None:
    model = check_study(study({"path": str(folder)})).models["m"]
    assert isinstance(model.shape, FoundShape)
    assert model.plain()["shape"] == SHAPE
    assert "shape" not in model.as_stated()
    stated = check_study(study({"path": str(folder)}, shape=SHAPE)).models["m"]
    assert stated.as_stated()["shape"] == SHAPE
    assert stated.plain() == model.plain()


def test_budgets_are_checked_with_the_shape_that_was_found(folder: Path) -> None:
    raw = study({"path": str(folder)})
    raw["methods"]["svd"]["uncompressed"] = ["q", "k", "v", "o", "gate", "up", "down"]
    with pytest.raises(RankwiseError, match="removing 20 % is out of reach"):
        check_study(raw)


def test_a_folder_of_another_architecture_is_named(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    with pytest.raises(RankwiseError, match=r"models\.m: its architecture \(`model_type: gpt2`\) is unknown"):
        check_study(study({"path": str(tmp_path)}))
    numbers = {"num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 96, "vocab_size": 50}
    numbers |= {"num_attention_heads": 3, "num_key_value_heads": 2}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"} | numbers))
    with pytest.raises(RankwiseError, match=r"models\.m: the shape that its files describe is impossible \(kv_heads: "):
        check_study(study({"path": str(tmp_path)}))


def test_planning_says_what_it_cannot_know(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(RankwiseError, match=r"models\.m\.shape: left out, .* not on this machine yet; .* data"):
        check_study(study(HUB))
    with pytest.raises(RankwiseError, match=r"models\.m\.shape: left out, and there is no model at no/where"):
        check_study(study({"path": "no/where"}))
    random = {"random": 0, "tokenizer": "m"}
    with pytest.raises(RankwiseError, match=r"models\.m\.shape: missing; a model with random weights is made of it"):
        check_study(study(random), unseen=True)
    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump(study(HUB)))
    assert main(["check", str(path)]) == 0
    said = capsys.readouterr().out
    assert "not known is the shape of m, " in said
    assert "or fetch with `snakemake data`" in said
    path.write_text(yaml.safe_dump(study({"path": "no/where"})))
    assert main(["check", str(path)]) == 0
    assert (
        "there is no model at no/where on this machine. Correct the path, or write `shape:`" in capsys.readouterr().out
    )


def test_without_shapes_everything_else_is_checked() -> None:
    raw = study(HUB)
    assert check_study(raw, unseen=True).models["m"].shape is None
    raw["tables"]["costs"]["rows"].append({"model": "n", "method": "svdd", "ratio": 20})
    with pytest.raises(RankwiseError) as caught:
        check_study(raw, unseen=True)
    assert str(caught.value).split("\n")[1:] == [
        "  tables.costs.rows[1].model: 'n' is not in `models` (there are: none)",
        "  tables.costs.rows[1].method: 'svdd' is not in `methods` - did you mean 'svd'?",
    ]


def test_what_was_fetched_says_its_shape(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The stage writes the shape that it found into the manifest, from which a plan reads it."""
    monkeypatch.chdir(tmp_path)
    raw = study({"path": str(folder)})
    stated = check_study(raw).models["m"].as_stated()
    manifest = fetch_model("m", Model.model_validate(stated), tmp_path, tmp_path / "results/short/models/m")
    assert manifest["shape"] == SHAPE
    place = MANIFEST.format(run="short", model="m")
    assert place in Layout(check_study(raw)).fetched()
    write_json(place, manifest | {"source": HUB | {"subset": None, "split": None, "file": None}})
    assert check_study(study(HUB)).models["m"].plain()["shape"] == SHAPE
    with pytest.raises(RankwiseError, match="not on this machine yet"):
        check_study(study(HUB | {"revision": "1" * 40}))


def test_a_stated_shape_is_compared_with_the_model(folder: Path, tmp_path: Path) -> None:
    model = check_study(study({"path": str(folder)}, shape=SHAPE | {"layers": 7})).models["m"]
    with pytest.raises(RankwiseError, match=r"models\.m\.shape\.layers: the config says 7, the model has"):
        fetch_model("m", model, tmp_path, tmp_path / "fetched")


def test_snakemake_data_is_planned_without_shapes(tmp_path: Path) -> None:
    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump(study(HUB)))

    def dry_run(target: str) -> str:
        options = ("-n", "--configfile", str(path), "--directory", str(tmp_path), "--cores", "1")
        command = [sys.executable, "-m", "snakemake", target, *options]
        run = subprocess.run(command, cwd=SHIPPED.parent, capture_output=True, text=True, check=False)
        assert "Traceback" not in run.stdout + run.stderr
        return run.stdout + run.stderr

    assert "fetch_model" in dry_run("data")
    said = dry_run("all")
    line = 1 + path.read_text().splitlines().index("  m:")
    assert f"{path} has 1 error:\n  line {line}: models.m.shape: left out" in said
    assert load_study(path, unseen=True).models["m"].shape is None


def test_published_ranks_of_a_model_without_a_shape_are_not_judged(tmp_path: Path) -> None:
    """The paper's own config, with shapes left to `snakemake data`."""
    raw = read_yaml(SHIPPED / "paper.yaml")
    for described in raw["models"].values():
        del described["shape"]
    path = tmp_path / "paper.yaml"
    path.write_text(yaml.safe_dump(raw))
    known = check_study(raw, str(path), [path], unseen=True)
    assert check_beside(known, SHIPPED, str(path), Lines([path], raw)) is known
