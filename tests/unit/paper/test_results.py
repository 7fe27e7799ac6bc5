"""All evaluations of a run as one frame."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from lowrank.config.outputs import Row
from lowrank.errors import RankwiseError
from lowrank.paper.results import COLUMNS, load_results
from tests.unit.paper import paper_samples as samples

PAGE = Path(__file__).parents[3] / "docs/results.md"
ROW = Row(model="tiny", method="svd", ratio=20)


def write(run: Path, suite: str, evaluation: dict[str, Any]) -> None:
    of = evaluation["subject"]
    parts = [of["model"], of["method"], str(of["ratio"]), of["tuning"], f"seed{of['seed']}", f"{suite}.json"]
    file = run.joinpath("evaluation", *parts)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(evaluation))


@pytest.fixture
def run(tmp_path: Path) -> Path:
    for seed in (0, 1):
        write(tmp_path, "ppl", samples.perplexity(ROW, 10.0 + seed, seed))
    write(tmp_path, "zs", samples.zero_shot(ROW, 0.5))
    write(tmp_path, "cost", samples.cost(ROW, 20.0))
    return tmp_path


def test_each_number_is_a_line_with_what_it_is_of(run: Path) -> None:
    results = load_results(run)
    assert tuple(results.columns) == COLUMNS
    assert len(results) == 2 * 2 + 7 + 6
    (line,) = results[(results["of"] == "speeches") & (results["seed"] == 1)].to_dict(orient="records")
    expected = {"model": "tiny", "method": "svd", "ratio": 20, "tuning": "none", "seed": 1, "suite": "ppl"}
    assert line == expected | {"of": "speeches", "measure": "perplexity", "value": 22.0, "stderr": pytest.approx(0.22)}
    (line,) = results[results["of"] == "hellaswag"].to_dict(orient="records")
    assert (line["measure"], line["value"], line["stderr"]) == ("acc_norm", pytest.approx(0.52), pytest.approx(0.012))
    costs = results[results["suite"] == "cost"].set_index("measure")
    assert costs.loc["linears_kept", "value"] == pytest.approx(0.8)
    assert costs.loc["parameters", "value"] == 1_000_000
    assert costs["stderr"].isna().all()


def test_a_folder_without_evaluations_is_named(tmp_path: Path) -> None:
    with pytest.raises(RankwiseError, match=re.escape(f"{tmp_path}/evaluation: holds no evaluations")):
        load_results(tmp_path)


def test_the_page_does_what_it_says(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names: dict[str, Any] = {}
    for block in re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL):
        exec(block.replace("results/quickstart", str(run)), names)
    assert isinstance(names["results"], pd.DataFrame)
    assert "speeches" in capsys.readouterr().out
    assert all(f"`{column}`" in PAGE.read_text(encoding="utf-8") for column in COLUMNS)
