"""Searches as drawings, from their logs."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from lowrank.config.load import load_study
from lowrank.errors import RankwiseError
from lowrank.layout import Layout
from lowrank.paper.page.progress import searches

REPOSITORY = Path(__file__).parents[4]
OBJECTIVES = [90.0, 40.0, 60.0, 30.0]


def searched(folder: Path, objectives: list[float], seed: int = 0) -> dict[Path, dict[str, Any]]:
    place = folder / f"seed{seed}"
    place.mkdir()
    columns = {"trial": range(len(objectives)), "origin": "spread", "perplexity": 1.0, "kl": 0.0, "kept": 0.8}
    pd.DataFrame(columns | {"objective": objectives}).to_csv(place / "trials.csv", index=False)
    subject = {"model": "tiny", "method": "bolaco", "ratio": 20, "tuning": "none", "seed": seed}
    return {place / "allocation.json": {"kind": "allocation", "subject": subject}}


def test_the_line_goes_down_with_the_best_so_far(tmp_path: Path) -> None:
    (found,) = searches(searched(tmp_path, OBJECTIVES) | searched(tmp_path, [5.0, 4.0], seed=1))
    assert (found.row.method, found.row.ratio, found.seed, found.best) == ("bolaco", 20, 0, 30.0)
    assert [(x, y) for x, y, _ in found.points] == [
        (found.x.place(number), found.y.place(value)) for number, value in enumerate(OBJECTIVES, start=1)
    ]
    heights = [float(part.split("H")[0]) for part in found.line.split("V")[1:]]
    assert heights == [found.y.place(value) for value in (40.0, 40.0, 30.0)]
    assert found.points[1][2] == "evaluation 2 (spread): 40"


def test_allocations_that_broke_the_model_have_no_point(tmp_path: Path) -> None:
    (found,) = searches(searched(tmp_path, [math.inf, 90.0, math.inf, 30.0]))
    assert [(x, said) for x, _, said in found.points] == [
        (found.x.place(2), "evaluation 2 (spread): 90"),
        (found.x.place(4), "evaluation 4 (spread): 30"),
    ]
    assert found.line == f"M{found.x.place(2)},{found.y.place(90.0)}H{found.x.place(4)}V{found.y.place(30.0)}"
    assert found.best == 30.0


def test_the_page_has_every_search_behind_what_was_evaluated() -> None:
    shown = Layout(load_study(REPOSITORY / "config/quickstart.yaml")).evidence()
    folder = "results/quickstart/allocation/smollm2-135m/bolaco-5x1"
    found = {f"{folder}/{ratio}/seed0/allocation.json" for ratio in (20, 30)}
    assert {path for path in shown if "/allocation/" in path} == found, "one of them alone stands in a table of times"


def test_one_evaluation_is_no_search(tmp_path: Path) -> None:
    assert searches(searched(tmp_path, [5.0])) == []
    assert searches({Path("evaluation/a.json"): {"kind": "perplexity"}}) == []


def test_a_missing_log_is_named(tmp_path: Path) -> None:
    evidence = searched(tmp_path, OBJECTIVES)
    (tmp_path / "seed0/trials.csv").unlink()
    with pytest.raises(RankwiseError, match=r"trials\.csv: missing"):
        searches(evidence)
