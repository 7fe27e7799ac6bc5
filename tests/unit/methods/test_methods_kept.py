"""What methods say that a checkpoint will hold, from shapes alone, against the checkpoint that they make."""

from __future__ import annotations

from typing import Any

import pytest

from lowrank.config.low_rank import LowRankSettings
from lowrank.config.presets import Covariance
from lowrank.methods import method_modules
from lowrank.model.parameters import count_parameters
from lowrank.ranks.budget import Budget
from tests import tiny
from tests.unit.model import factor_samples as samples

DOWN = {"rounding": "down"}
PRUNED = {"skip_first": 1, "skip_last": 0, "importance": "l1"}
PRESETS: list[tuple[str, dict[str, Any]]] = [
    ("svd", {}),
    ("svd", DOWN),
    ("svd", {"identity_block": True, "uncompressed": ("v",)}),
    ("svd", {"uncompressed": ("o", "q"), **DOWN}),
    ("afm", {}),
    ("afm", DOWN),
    ("afm", {"uncompressed": ("v",)}),
    ("afm", {"estimator": "uncentred", **DOWN}),
    ("lord", {}),
    ("lord", DOWN),
    ("fwsvd", DOWN),
    ("svd-llm", {"update": True}),
    ("asvd", {"allocation": "uniform"}),
    ("asvd", {"allocation": "uniform", "identity_block": True}),
    ("asvd", {"allocation": "uniform", **DOWN}),
    ("slicegpt", {}),
    ("slicegpt", {"slice": 0.2}),
    ("llm-pruner", PRUNED),
    ("llm-pruner", {**PRUNED, "own_ratio": 0.3}),
    ("flap", {"structure": "UL-UM"}),
    ("flap", {"structure": "UL-MM", "remove_heads": 4}),
    ("aa-svd", {}),
    ("skipcat", {}),
    ("skipcat", {"cat": False, "uncompressed": ("v",)}),
    ("skipcat", {"skip": False}),
    ("basis-sharing", {}),
    ("basis-sharing", {"shared": ["k", "v"], "uncompressed": ("q",)}),
]
BY_DATA: list[tuple[str, dict[str, Any]]] = [
    ("asvd", {"calibration": "c"}),
    ("flap", {"calibration": "c"}),
    ("flap", {"calibration": "c", "structure": "AL-MM", "remove_heads": 2}),
    ("rankwise", {"calibration": "c", "covariance": "v"}),
    ("obd-llm", {"calibration": "c", "allocation": "first-order"}),
    ("modegpt", {"calibration": "c"}),
    ("llrc", {"calibration": "c"}),
    ("zs-svd", {"calibration": "c"}),
    ("bolaco", {"calibration": "c", "covariance": "v", "validation": "w", "search": "s"}),
]
RATIO = 25


@pytest.mark.parametrize(
    ("method", "preset", "kind"),
    [
        (method, preset, kind)
        for method, preset in PRESETS
        for kind in tiny.FEW
        if kind in {"slicegpt": tiny.ROTATED, "flap": tiny.HEADS_GO, "llm-pruner": tiny.HEADS_GO}.get(method, tiny.FEW)
    ],
)
def test_shapes_tell_to_the_last_parameter(method: str, preset: dict[str, Any], kind: str) -> None:
    preset, bases = dict(preset), None
    if method in ("afm", "lord"):
        estimator = preset.pop("estimator", "naive")
        bases = samples.bases(kind, estimator)
        preset["covariance"] = estimator
    model, _ = samples.compressed(method, kind, RATIO, given_bases=bases, **preset)
    named = {} if method == "svd" else {"calibration": "c"}
    settings = method_modules()[method].Settings.model_validate({"kind": method, **named, **preset})
    budget = Budget.of(samples.shape_of(kind))
    if isinstance(settings, LowRankSettings):
        covariance = Covariance(estimator=preset["covariance"]) if bases else None
        budget = settings.budget_of_pairs(budget, covariance)
    found = count_parameters(model, samples.shape_of(kind))["decoder_linears"]
    assert settings.kept_parameters(budget, RATIO) == found


@pytest.mark.parametrize(("method", "preset"), BY_DATA)
def test_what_data_decide_is_not_foretold(method: str, preset: dict[str, Any]) -> None:
    settings = method_modules()[method].Settings.model_validate({"kind": method, **preset})
    assert settings.kept_parameters(Budget.of(samples.shape_of("llama-gqa")), RATIO) is None


def test_all_methods_are_here() -> None:
    assert {name for name, _ in [*PRESETS, *BY_DATA]} | {"dense"} == set(method_modules())
