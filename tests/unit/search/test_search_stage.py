"""The search as its rule runs it: what the allocation records, resuming, and a transfer between two models."""

from __future__ import annotations

import json
import runpy
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lowrank.config.presets import Covariance, Search
from lowrank.config.sources import ModelShape
from lowrank.files import save_tensors
from lowrank.model.parameters import count_parameters
from lowrank.ranks.budget import Budget
from tests import tiny
from tests.unit.methods import rankwise_samples as samples
from tests.unit.search.test_search import tiny_bases

STAGE = Path(__file__).parents[3] / "workflow_scripts/stages/search_allocation.py"
METHOD = {"kind": "bolaco", "groups": 2, "uncompressed": ["v"], "identity_block": False}


class Named(SimpleNamespace):
    """What a rule has of inputs: attributes, and `get` for those that may be missing."""

    def get(self, name: str, otherwise: object = None) -> Any:
        return getattr(self, name, otherwise)

    def __iter__(self) -> Iterator[Any]:
        return iter(vars(self).values())

    def items(self) -> Iterator[tuple[str, Any]]:
        return iter(vars(self).items())


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A tiny model with its bases and validation windows."""
    folder = tmp_path_factory.mktemp("inputs")
    tiny.model("llama-gqa").save_pretrained(folder / "model")
    tiny.tokenizer().save_pretrained(folder / "model")
    tiny_bases("llama-gqa", folder)
    windows = torch.randint(2, 400, (3, 20), generator=torch.Generator().manual_seed(3)).int()
    save_tensors(folder / "windows.safetensors", {"tokens": windows})
    (folder / "record.json").write_text("{}")
    return {
        "model": str(folder / "model"),
        "model_manifest": str(folder / "record.json"),
        "bases": str(folder / "bases"),
        "bases_manifest": str(folder / "record.json"),
        "windows": str(folder / "windows.safetensors"),
    }


def run(inputs: dict[str, str], folder: Path, search: Search, name: str = "here", **settings: Any) -> dict[str, Any]:
    """Run the stage; returns its allocation."""
    output = Named(allocation=str(folder / name / "allocation.json"), trials=str(folder / name / "trials.csv"))
    (folder / name).mkdir(parents=True)
    job = Named(
        rule="search_allocation",
        threads=1,
        log=[],
        resources={},
        input=Named(**inputs),
        output=output,
        params=Named(
            settings={
                "model": name,
                "dtype": "float32",
                "shape": tiny.shape("llama-gqa"),
                "method": METHOD,
                "search": search.plain(),
                "subject": {"model": name, "method": "bolaco", "ratio": 25, "tuning": "none", "seed": 0},
                "state": str(folder / "state"),
                **settings,
            }
        ),
    )
    runpy.run_path(str(STAGE), init_globals={"snakemake": job})
    allocation: dict[str, Any] = json.loads(Path(output.allocation).read_text())
    return allocation


def test_the_allocation_records_where_it_comes_from_and_what_it_keeps(inputs: dict[str, str], tmp_path: Path) -> None:
    found = run(inputs, tmp_path, Search(evaluations=4, initial=3, kl_weight=0))
    lines = (tmp_path / "here/trials.csv").read_text().splitlines()
    rows = [dict(zip(lines[0].split(","), line.split(","), strict=True)) for line in lines[1:]]
    assert [row["origin"] for row in rows] == ["uniform", "lord", "spread", "improvement"]
    assert found["uniform_objective"] == float(rows[0]["objective"])
    assert found["lord_objective"] == float(rows[1]["objective"])
    assert found["objective"] == min(float(row["objective"]) for row in rows)
    assert found["origin"] == rows[found["best_trial"]]["origin"]
    assert found["kl"] is None
    assert found["transfer"] is None
    shape = ModelShape(**tiny.shape("llama-gqa"))
    budget, dense = Budget.of(shape), count_parameters(tiny.model("llama-gqa"), shape)
    assert found["kept"] == budget.parameters(found["ranks"]) / dense["decoder_linears_dense"]
    kept = dense["total"] - dense["decoder_linears_dense"] + budget.parameters(found["ranks"])
    assert found["kept_of_model"] == pytest.approx(kept / dense["total"], rel=1e-12)
    assert not list((tmp_path / "state").iterdir()), "nothing is left to resume"


def test_what_uncentred_bases_keep_is_counted_without_biases(inputs: dict[str, str], tmp_path: Path) -> None:
    tiny_bases("llama-gqa", tmp_path, Covariance(estimator="uncentred"))
    found = run(inputs | {"bases": str(tmp_path / "bases")}, tmp_path, Search(evaluations=2, initial=2, kl_weight=0))
    budget = replace(Budget.of(ModelShape(**tiny.shape("llama-gqa"))), adds_bias=False)
    assert found["kept"] == budget.kept(found["ranks"])


def test_an_allocation_is_transferred_as_it_is_or_as_a_warm_start(inputs: dict[str, str], tmp_path: Path) -> None:
    source = run(inputs, tmp_path, Search(evaluations=3, initial=3, start=["lord"]), "source")
    shape = tiny.shape("llama-gqa")
    moved = inputs | {"source": str(tmp_path / "source/allocation.json")}
    direct = run(moved, tmp_path, Search(evaluations=1, initial=1, start=[]), "direct", source_shape=shape)
    assert direct["origin"] == "transfer"
    assert direct["evaluations"] == 1
    assert direct["uniform_objective"] is direct["lord_objective"] is None
    assert direct["transfer"] == {"from": source["subject"], "ratios": source["variables"]}
    assert direct["ranks"] == source["ranks"], "the same model at the same budget"
    warm = run(moved, tmp_path, Search(evaluations=3, initial=1, start=["uniform"]), "warm", source_shape=shape)
    origins = [line.split(",")[1] for line in (tmp_path / "warm/trials.csv").read_text().splitlines()[1:]]
    assert origins == ["transfer", "uniform", "improvement"]
    assert warm["objective"] <= direct["objective"]


def test_a_source_that_does_not_fit_ends_the_job_with_one_message(
    inputs: dict[str, str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source = {"subject": {"model": "tiny-opt"}, "groups": [[0, 1]], "variables": {"qk": [0.5], "fc1": [0.5]}}
    (tmp_path / "opt.json").write_text(json.dumps(source))
    moved = inputs | {"source": str(tmp_path / "opt.json")}
    with pytest.raises(SystemExit):
        run(moved, tmp_path, Search(evaluations=1, initial=1, start=[]), source_shape=tiny.shape("opt"))
    assert "'tiny-opt' of family 'opt', which has no layers of type 'gate'" in caplog.text


def test_factors_on_predicted_losses_are_searched_from_the_prediction_on(
    inputs: dict[str, str], tmp_path: Path
) -> None:
    search = Search(variables="loss-scales", evaluations=3, initial=2)
    method = METHOD | {"uncompressed": [], "identity_block": True}
    predicting = inputs | {"bases": str(samples.fisher_bases("llama-gqa").files[0].parent)}
    found = run(predicting, tmp_path, search, method=method)
    origins = [line.split(",")[1] for line in (tmp_path / "here/trials.csv").read_text().splitlines()[1:]]
    assert origins == ["predicted", "spread", "improvement"]
    assert found["objective"] <= found["predicted_objective"]
    assert found["uniform_objective"] is None
    assert set(found["variables"]) == {"qk", "v", "o", "gate", "up", "down"}
    assert found["kept"] <= 0.75
    with pytest.raises(SystemExit):
        run(inputs, tmp_path, search, "without", method=method)
