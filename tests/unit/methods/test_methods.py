"""The methods: each on every family, against an independent computation, within its budget."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from lowrank.bases.principal import Bases
from lowrank.cluster.compression_needs import ALL_AT_ONCE
from lowrank.compression.compress import compress_model
from lowrank.config.sources import ModelShape
from lowrank.errors import RankwiseError
from lowrank.jobs.state import Parts
from lowrank.methods import method_modules
from lowrank.model.checkpoint import replace_modules
from lowrank.model.parameters import count_parameters
from lowrank.model.replacements import Deferred, Replacements
from lowrank.ranks.budget import Budget, Ranks
from lowrank.ranks.by_type import lord_ranks, uniform_ranks
from tests import tiny
from tests.unit.model import factor_samples
from tests.unit.search.test_search import tiny_bases

NAMES = {"calibration": "c", "covariance": "v", "validation": "w", "search": "s"}


def compressed(
    kind: str, model_kind: str, bases: Bases | None = None, allocation: Ranks | None = None, **settings: object
) -> tuple[torch.nn.Module, Ranks]:
    model = tiny.model(model_kind)
    budget = Budget.of(ModelShape(**tiny.shape(model_kind)))
    task = {"model": model, "budget": budget, "ratio": 25, "seed": 0, "bases": bases, "allocation": allocation}
    return model, compress_model(kind, {"kind": kind, **settings}, task)


@pytest.mark.parametrize("kind", tiny.FEW)
def test_plain_svd_is_the_truncated_decomposition(kind: str) -> None:
    dense = tiny.model(kind)
    model, ranks = compressed("svd", kind)
    assert any(ranks.values())
    for name, rank in ranks.items():
        if rank is None:
            continue
        weight = dense.get_submodule(name).weight.double()
        u, s, vh = torch.linalg.svd(weight, full_matrices=False)
        layer = model.get_submodule(name)
        expected = (u[:, :rank] * s[:rank]) @ vh[:rank]
        assert torch.allclose(layer.up.weight.double() @ layer.down.weight.double(), expected, atol=1e-5)
        bias = dense.get_submodule(name).bias
        assert (layer.up.bias is None) == (bias is None)
        assert bias is None or torch.equal(layer.up.bias, bias)


@pytest.mark.parametrize("kind", tiny.FEW)
def test_plain_svd_spends_its_budget_on_ranks_alone(kind: str) -> None:
    model, ranks = compressed("svd", kind)
    shape = ModelShape(**tiny.shape(kind))
    budget = replace(Budget.of(shape), adds_bias=False)
    counts = count_parameters(model, shape)
    assert counts["decoder_linears"] == budget.parameters(ranks) <= budget.allowed(25)
    assert ranks == uniform_ranks(budget, 25, ())


@pytest.mark.parametrize("kind", tiny.FEW)
@pytest.mark.parametrize("method", ["svd", "fwsvd", "asvd", "svd-llm", "aa-svd", "obd-llm", "afm"])
def test_methods_of_one_ratio_round_as_they_are_told(method: str, kind: str) -> None:
    options: dict[str, Any] = {"allocation": "uniform"} if method == "asvd" else {}
    if method == "obd-llm":
        options["gradients"] = factor_samples.output_gradients(kind)
    budget = replace(Budget.of(ModelShape(**tiny.shape(kind))), adds_bias=method == "afm")
    for rounding in ("down", "give-back"):
        _, ranks = factor_samples.compressed(method, kind, 25, rounding=rounding, **options)
        assert ranks == uniform_ranks(budget, 25, (), rounding)
    _, ranks = factor_samples.compressed(method, kind, 25, rounding="down", uncompressed=["o"], **options)
    assert ranks == uniform_ranks(budget, 25, ("o",), "down")


@pytest.mark.parametrize("kind", tiny.FEW)
def test_lord_and_bolaco_slice_the_same_bases_at_their_own_ranks(kind: str, tmp_path: Path) -> None:
    bases = tiny_bases(kind, tmp_path)
    budget = Budget.of(ModelShape(**tiny.shape(kind)))
    _, lord = compressed("lord", kind, bases, calibration="c", covariance="v")
    assert lord == lord_ranks(budget, 25, "give-back")
    assert budget.kept(lord) <= 0.75
    model, bolaco = compressed("bolaco", kind, bases, lord, **NAMES)
    assert bolaco == lord
    module = budget.modules[0]
    weight = tiny.model(kind).get_submodule(module.name).weight
    pair = bases.of(module.layer, module.type.name, weight).factors(lord[module.name] or 0)
    assert torch.equal(model.get_submodule(module.name).up.weight, pair.up)


def test_a_method_without_what_it_reads_says_so() -> None:
    with pytest.raises(RankwiseError, match="needs `calibration` and `covariance`"):
        compressed("lord", "llama", calibration="c", covariance="v")
    with pytest.raises(RankwiseError, match="no allocation was given"):
        compressed("bolaco", "llama", **NAMES)


OF_TWO_BLOCKS: dict[str, dict[str, Any]] = {
    "asvd": {"allocation": "uniform"},
    "llm-pruner": {"skip_first": 0, "skip_last": 0, "sequences": 4, "length": 32},
    "svd-llm": {"update": True},
    "llrc": {"steps": 400, "batch_size": 4, "learning_rate": 0.1, "growth": 0.05},
}


@pytest.mark.parametrize("method", sorted(set(method_modules()) - {"bolaco", "dense", "lord", "rankwise"}))
def test_new_layers_are_there_as_the_plan_says(method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One after the other, but for the methods that it names; of those left out, bases decide or another test tells."""
    seen = []

    def replaced(model: torch.nn.Module, replacements: Replacements) -> dict[str, int]:
        seen.append(replacements)
        return replace_modules(model, replacements)

    monkeypatch.setattr("lowrank.compression.compress.replace_modules", replaced)
    options, parts = OF_TWO_BLOCKS.get(method, {}), Parts(tmp_path)
    gradients = factor_samples.output_gradients("llama-gqa")
    factor_samples.compressed(method, "llama-gqa", 25, gradients=gradients, finished_parts=parts, **options)
    (replacements,) = seen
    assert len(replacements) > tiny.LAYERS
    assert isinstance(replacements, Deferred) == (method not in ALL_AT_ONCE)
