"""Methods that are not defined for a family say so, in the check of the config and before they compute anything."""

from __future__ import annotations

from typing import Any

import pytest

from lowrank.compression.compress import compress_model
from lowrank.config.sources import ModelShape
from lowrank.errors import RankwiseError
from lowrank.methods import method_modules
from lowrank.ranks.budget import Budget
from tests import tiny

HEADS = "queries and keys over all heads at once"
STREAM = "the residual stream of family '{family}' cannot be rotated"
WHOLE = {"skip_first": 0, "skip_last": 0}
CASES: list[tuple[str, dict[str, Any], str, str, str]] = [
    ("flap", {}, "olmo2", "kind", HEADS),
    ("llm-pruner", WHOLE, "olmo2", "kind", HEADS),
    ("slicegpt", {}, "olmo2", "kind", STREAM),
    ("slicegpt", {}, "gemma3_text", "kind", STREAM),
    ("slicegpt", {}, "opt", "kind", STREAM),
    ("modegpt", {}, "olmo2", "parts", r"norms q and k as wholes.*parts: \[mlp, vo\]"),
    ("modegpt", {}, "phi3", "parts", r"may rotate only a part of each head.*parts: \[mlp, vo\]"),
    ("modegpt", {}, "gemma3_text", "parts", r"norms q and k head by head.*parts: \[mlp, vo\]"),
]


@pytest.mark.parametrize(("method", "options", "kind", "key", "message"), CASES)
def test_the_family_and_the_method_are_named(
    method: str, options: dict[str, Any], kind: str, key: str, message: str
) -> None:
    shape = ModelShape(**tiny.shape(kind))
    preset, budget = {"kind": method, "calibration": "c", **options}, Budget.of(shape)
    message = message.format(family=shape.family)
    found = list(method_modules()[method].Settings(**preset).misfits(budget, 20, None))
    assert [place for place, _ in found] == [key]
    assert f"family '{shape.family}'" in found[0][1]
    task = {"model": tiny.model(kind), "budget": budget, "ratio": 20, "seed": 0}  # neither tokens nor statistics
    with pytest.raises(RankwiseError, match=f"^(model .*: )?{method}: .*{message}"):
        compress_model(method, preset, task)


@pytest.mark.parametrize("kind", tiny.SHAPES)
def test_all_others_are_defined(kind: str) -> None:
    refused = {(method, family) for method, _, family, _, _ in CASES} | {("modegpt", "qwen3")}
    budget = Budget.of(ModelShape(**tiny.shape(kind)))
    for method, options in (("flap", {}), ("llm-pruner", WHOLE), ("slicegpt", {}), ("modegpt", {})):
        settings = method_modules()[method].Settings(kind=method, calibration="c", **options)
        assert bool(list(settings.misfits(budget, 20, None))) == ((method, kind) in refused)
