"""What tables of arithmetic would fail on, told before anything runs."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from lowrank.config.arithmetic import arithmetic_problems
from lowrank.config.outputs import ArithmeticTable
from lowrank.config.sources import ModelShape
from tests import tiny

FOLDER = Path(__file__).parents[3] / "config" / "published"
LLAMA = ModelShape(**tiny.LLAMA_2_7B)
SHAPES = {
    "llama-2-7b": LLAMA,
    "llama-2-13b": LLAMA.model_copy(
        update={"layers": 40, "hidden": 5120, "intermediate": 13824, "heads": 40, "kv_heads": 40}
    ),
    "smollm2-135m": ModelShape(**tiny.SMOLLM),
    "opt": LLAMA.model_copy(update={"family": "opt"}),
}
ROW = {"model": "llama-2-7b", "method": "bolaco-5x1", "ratio": 20}


def problems(model: str = "llama-2-7b", **changes: Any) -> list[str]:
    ranks, statistics = ({"file": file, **ROW} for file in ("table_8", "table_7"))
    check = {"model": model, "ranks": ranks, "statistics": statistics, **changes}
    table = ArithmeticTable(kind="arithmetic", title="t", checks=[check])
    return list(arithmetic_problems({"sums": table}, FOLDER, SHAPES))


def test_what_can_be_computed_is_accepted() -> None:
    assert problems() == []
    assert problems("llama-2-13b", units_of="llama-2-7b") == []


@pytest.mark.parametrize(
    ("model", "changes", "says"),
    [
        (
            *("llama-2-7b", {"statistics": {"file": "table_7", **ROW, "ratio": 30}}),
            "the ranks are of ratio '20', the statistics of '30'; both must be published of one "
            "model, ratio and method",
        ),
        (
            *("llama-2-7b", {"statistics": {"file": "table_1", **ROW}}),
            "the file of the statistics prints no `parameters_billion` for this row; name another `file`",
        ),
        (
            *("llama-2-7b", {"ranks": {"file": "table_1", **ROW}}),
            "ranks of 'boolq', a type that family 'llama' does not have; leave this check out",
        ),
        (
            *("smollm2-135m", {}),
            "rank 744 of model.layers.0.self_attn.q_proj (576 x 576): a pair is smaller than the matrix at ranks 1 to "
            "287 only; if the ranks are in units of another model, write `units_of: llama-2-7b or llama-2-13b`",
        ),
        (
            *("llama-2-7b", {"units_of": "smollm2-135m"}),
            "rank 5291 of model.layers.0.self_attn.q_proj (4096 x 4096): a pair is smaller than the matrix at ranks 1 "
            "to 2047 only; leave out `units_of`",
        ),
        (
            *("opt", {}),
            "ranks of 'gate', a type that family 'opt' does not have; name another model (llama-2-7b, llama-2-13b)",
        ),
    ],
)
def test_it_says_what_is_wrong_and_what_the_next_try_accepts(model: str, changes: dict[str, Any], says: str) -> None:
    (problem,) = problems(model, **changes)
    assert problem.startswith("tables.sums.checks[0]: ")
    assert problem.endswith(says)
    if units := re.search(r"`units_of: (.*)`", problem):
        assert all(problems(model, **changes, units_of=name) == [] for name in units[1].split(" or "))
    if "leave out `units_of`" in problem:
        assert problems(model) == []
    if models := re.search(r"another model \((.*)\)", problem):
        assert all(problems(name, **changes) == [] for name in models[1].split(", "))


def test_what_is_reported_elsewhere_is_passed_over() -> None:
    assert problems("nowhere") == []
    assert problems(ranks={"file": "table_8", **ROW, "method": "nothing"}) == []
