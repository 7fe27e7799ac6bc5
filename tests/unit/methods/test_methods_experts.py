"""Every method on models whose blocks have experts: what is defined keeps the budget, what is not is refused."""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedModel

from lowrank.bases.block import bases_of_block, linears_of
from lowrank.bases.principal import Bases
from lowrank.calibration.output_gradients import OutputGradients, collect_output_gradients
from lowrank.calibration.routing import about_experts
from lowrank.calibration.statistics import Statistics, collect_statistics, load_moments
from lowrank.compression.compress import compress_model
from lowrank.config.presets import Covariance, MethodSettings
from lowrank.config.sources import ModelShape
from lowrank.config.tuning import LoraTuning
from lowrank.errors import RankwiseError
from lowrank.evaluation.cost import count_macs
from lowrank.files import layer_name, save_tensors
from lowrank.methods import method_modules
from lowrank.model.checkpoint import family_of, load_checkpoint, recipe_of, replace_modules, save_checkpoint
from lowrank.model.factors import LowRankFactors
from lowrank.model.modeling_rankwise import LowRankLinear
from lowrank.model.parameters import count_parameters
from lowrank.post_training.lora import attach_lora, learnt_matrices, merge_lora, target_weights
from lowrank.ranks.budget import Budget, Ranks
from lowrank.ranks.counts import count
from lowrank.search.kept_ratios import SearchSpace
from lowrank.search.loss_scales import predicted_losses
from lowrank.search.sensitivity import measure_sensitivity
from lowrank.search.sliced_model import open_sliced_model
from lowrank.search.truncations import choose_truncations, measure_truncations
from tests import tiny
from tests.unit.calibration.test_statistics_experts import routed_by_hand

CPU = torch.device("cpu")
FOLDER = tempfile.TemporaryDirectory(prefix="experts-")
TOKENS = torch.randint(2, 400, (8, 32), generator=torch.Generator().manual_seed(5))
LEAST = 110
"""Tokens below which experts stay dense here: some do, and most do not."""

WITH_GRADIENTS = Covariance(estimator="pooled", groups=4, gradients="weigh")
DEFINED: dict[str, dict[str, Any]] = {
    "svd": {"kind": "svd"},
    "afm": {"kind": "afm", "covariance": "naive"},
    "lord": {"kind": "lord", "covariance": "naive"},
    "svd-llm": {"kind": "svd-llm"},
    "svd-llm, identity block": {"kind": "svd-llm", "identity_block": True},
    "asvd": {"kind": "asvd", "allocation": "uniform"},
    "obd-llm": {"kind": "obd-llm"},
    "obd-llm, first order": {"kind": "obd-llm", "allocation": "first-order"},
    "zs-svd": {"kind": "zs-svd"},
    "zs-svd, second order": {"kind": "zs-svd", "allocation": "predicted-loss"},
    "skipcat": {"kind": "skipcat"},
    "rankwise": {"kind": "rankwise", "covariance": "weigh"},
}
UNDEFINED: dict[str, dict[str, Any]] = {
    "flap": {"kind": "flap"},
    "llm-pruner": {"kind": "llm-pruner"},
    "slicegpt": {"kind": "slicegpt"},
    "modegpt": {"kind": "modegpt"},
    "fwsvd": {"kind": "fwsvd"},
    "aa-svd": {"kind": "aa-svd"},
    "llrc": {"kind": "llrc"},
    "basis-sharing": {"kind": "basis-sharing"},
    "asvd, single trials": {"kind": "asvd"},
    "svd-llm with its update": {"kind": "svd-llm", "update": True},
    "zs-svd with corrections": {"kind": "zs-svd", "corrections": 1},
    "rankwise, neurons": {"kind": "rankwise", "covariance": "weigh", "mlp": "neurons"},
    "rankwise, both": {"kind": "rankwise", "covariance": "weigh", "mlp": "both"},
}


def shape_of(kind: str) -> ModelShape:
    return ModelShape(**tiny.shape(kind))


@cache
def statistics(kind: str) -> Statistics:
    folder = Path(FOLDER.name) / "statistics" / kind
    folder.mkdir(parents=True)
    collect_statistics(tiny.model(kind), TOKENS, 2, folder, CPU, expert_tokens=LEAST)
    return Statistics(folder, shape_of(kind))


@cache
def gradients(kind: str) -> OutputGradients:
    folder = Path(FOLDER.name) / "gradients" / kind
    folder.mkdir(parents=True)
    collect_output_gradients(tiny.model(kind), TOKENS, 1, folder, CPU)
    return OutputGradients(folder, shape_of(kind))


@cache
def bases(kind: str, weighed: bool) -> Bases:
    folder = Path(FOLDER.name) / f"bases-{weighed}" / kind
    folder.mkdir(parents=True)
    model = tiny.model(kind)
    family, covariance = family_of(model), WITH_GRADIENTS if weighed else Covariance(estimator="naive")
    for layer in range(tiny.LAYERS):
        file = Path(statistics(kind).folder) / layer_name(layer)
        moments = load_moments(file, family.sites)
        linears = linears_of(model.get_submodule(f"{family.blocks}.{layer}"), family, moments)
        given = gradients(kind).of(layer) if weighed else None
        stored = bases_of_block(linears, moments, covariance, CPU, "block", given)
        save_tensors(folder / layer_name(layer), stored | about_experts(file, family))
    return Bases(folder, tiny.LAYERS)


def settings_of(preset: Mapping[str, Any]) -> dict[str, Any]:
    return dict(preset) if preset["kind"] in ("svd", "dense") else {"calibration": "c", **preset}


def compressed(kind: str, preset: Mapping[str, Any], ratio: int) -> tuple[PreTrainedModel, Ranks, dict[str, Any]]:
    model, account, settings = tiny.model(kind), {}, settings_of(preset)
    typed: MethodSettings = method_modules()[settings["kind"]].Settings.model_validate(settings)
    reads = typed.needs
    given = {
        "model": model,
        "budget": Budget.of(shape_of(kind)),
        "ratio": ratio,
        "seed": 0,
        "account": account,
        "bases": bases(kind, settings["covariance"] == "weigh") if "covariance" in settings else None,
        "statistics": statistics(kind) if "statistics" in reads else None,
        "gradients": gradients(kind) if "gradients" in reads else None,
        "tokens": TOKENS if "tokens" in reads else None,
    }
    return model, compress_model(settings["kind"], settings, given), account


def test_every_method_is_either_defined_here_or_refused() -> None:
    known = {preset["kind"] for preset in (*DEFINED.values(), *UNDEFINED.values())} | {"bolaco", "dense"}
    assert known == set(method_modules())


@pytest.mark.parametrize("kind", tiny.MIXTURES)
@pytest.mark.parametrize("preset", DEFINED)
def test_the_budget_holds_over_all_experts_and_those_with_few_tokens_stay_dense(preset: str, kind: str) -> None:
    model, ranks, account = compressed(kind, DEFINED[preset], 20)
    budget = Budget.of(shape_of(kind))
    few = account["experts_left_dense"]
    if preset == "svd":  # which reads no statistics
        assert few == {}
    else:
        assert 0 < len(few) < 8
        assert all(count < LEAST for count in few.values())
    dense = {module.name for module in budget.modules if module.name.rpartition(".")[0] in few}
    for module in budget.modules:
        layer = model.get_submodule(module.name)
        if module.name in dense:
            assert ranks[module.name] is None
            assert torch.equal(layer.weight, tiny.model(kind).get_submodule(module.name).weight)
    experts = [module for module in budget.modules if module.type.expert is not None and module.name not in dense]
    assert sum(ranks[module.name] is not None for module in experts) > len(experts) / 2
    counts = count_parameters(model, shape_of(kind))
    assert 0.77 < counts["decoder_linears"] / counts["decoder_linears_dense"] <= 0.8
    for name, parameter in tiny.model(kind).named_parameters():
        if name.endswith("mlp.gate.weight") or "norm" in name:
            assert torch.equal(model.get_parameter(name), parameter)
    assert bool(model(TOKENS).logits.isfinite().all())


@pytest.mark.parametrize("kind", tiny.MIXTURES)
@pytest.mark.parametrize("preset", [name for name in DEFINED if name != "lord"])  # whose ratios at 0 % leave rounding
def test_nothing_removed_leaves_the_logits_as_they_are(preset: str, kind: str) -> None:
    model, ranks, _ = compressed(kind, DEFINED[preset], 0)
    assert set(ranks.values()) == {None}
    assert torch.equal(model(TOKENS).logits, tiny.model(kind)(TOKENS).logits)


@pytest.mark.parametrize("preset", UNDEFINED)
def test_what_is_not_defined_is_refused_with_method_and_family(preset: str) -> None:
    with pytest.raises(RankwiseError, match=f"^{UNDEFINED[preset]['kind']}: not defined for the experts of family 'mi"):
        compressed("mixtral", UNDEFINED[preset], 20)


@pytest.mark.parametrize("kind", tiny.MIXTURES)
def test_an_experts_matrices_are_the_best_for_the_tokens_that_it_gets(kind: str) -> None:
    """Of SVD-LLM, against a whitened decomposition in numpy of the tokens routed by hand."""
    model, ranks, _ = compressed(kind, DEFINED["svd-llm"], 40)
    by_hand, compared = routed_by_hand(kind, TOKENS), 0
    for module in Budget.of(shape_of(kind)).modules:
        rank = ranks[module.name]
        if module.type.expert is None or rank is None:
            continue
        _, read, fed = zip(*by_hand[module.layer, module.type.expert], strict=True)
        x = np.array(fed if module.type.name == "down" else read)
        w = tiny.model(kind).get_submodule(module.name).weight.double().numpy()
        pair = model.get_submodule(module.name)
        assert isinstance(pair, LowRankLinear)
        product = (pair.up.weight.double() @ pair.get_parameter("down.weight").double()).numpy()
        error = np.linalg.norm(x @ (w - product).T) ** 2
        best = (np.linalg.svd(x @ w.T, compute_uv=False)[rank:] ** 2).sum()
        assert error == pytest.approx(best, rel=2e-3, abs=1e-6 * np.linalg.norm(x @ w.T) ** 2)
        compared += 1
    assert compared > 12


@pytest.mark.parametrize("kind", tiny.MIXTURES)
def test_output_gradients_of_experts_equal_those_of_single_tokens_in_float64(kind: str, tmp_path: Path) -> None:
    """The loss's gradient at each output of an expert, by a small change of its bias for one token at a time."""
    model, tokens = tiny.model(kind).double(), TOKENS[:2, :12]
    files = collect_output_gradients(model, tokens, 2, tmp_path, CPU)
    from lowrank.calibration.output_gradients import load_output_gradients

    name = "model.layers.1.mlp.experts"
    for expert in range(4):
        caught: list[torch.Tensor] = []

        def keep(module: Any, args: Any, output: torch.Tensor, caught: list[torch.Tensor] = caught) -> torch.Tensor:
            caught.append(output.detach().requires_grad_(True))
            return caught[-1]

        handle = model.get_submodule(f"{name}.{expert}.up_proj").register_forward_hook(keep)
        logits = model(tokens).logits[:, :-1].log_softmax(-1)
        handle.remove()
        loss = -logits.gather(-1, tokens[:, 1:, None]).sum()
        if not len(caught):
            expected = torch.zeros(tiny.INTERMEDIATE, tiny.INTERMEDIATE, dtype=torch.float64)
        else:
            (g,) = torch.autograd.grad(loss, caught)
            expected = g.T @ g / (2 * 11)
        found = load_output_gradients(files[1], [f"up.{expert}"])[f"up.{expert}"].double()
        assert torch.allclose(found, expected, atol=1e-6 * max(float(expected.abs().max()), 1e-9))


@pytest.mark.parametrize("kind", tiny.MIXTURES)
def test_a_compressed_checkpoint_reads_back_and_says_which_layers_are_pairs(kind: str, tmp_path: Path) -> None:
    tiny.tokenizer().save_pretrained(tmp_path / "tokenizer")
    model, ranks, _ = compressed(kind, DEFINED["rankwise"], 30)
    save_checkpoint(model, tmp_path / "tokenizer", tmp_path / "checkpoint")
    again = load_checkpoint(tmp_path / "checkpoint", torch.float32)
    assert torch.equal(again(TOKENS).logits, model(TOKENS).logits)
    assert set(recipe_of(again)) == {name for name, rank in ranks.items() if rank is not None}


@pytest.mark.parametrize("kind", tiny.MIXTURES)
def test_experts_share_the_rank_that_a_search_gives_a_type_in_a_group_of_layers(kind: str, tmp_path: Path) -> None:
    tiny.tokenizer().save_pretrained(tmp_path / "tokenizer")
    save_checkpoint(tiny.model(kind), tmp_path / "tokenizer", tmp_path / "dense")
    found, shape = bases(kind, False), shape_of(kind)
    given = {"dtype": "float32", "shape": shape.plain()}
    opened = open_sliced_model(str(tmp_path / "dense"), str(found.files[0].parent), given, 1)
    space = SearchSpace(opened.budget, 25, 2, ("v",), lower=0.2)
    assert space.names == [f"{name}/{group}" for group in (0, 1) for name in ("qk", "o", "gate", "up", "down")]
    for x in (space.uniform(), *space.sample(2, seed=0)):
        ranks = space.ranks(x)
        assert 0.74 < opened.budget.kept(ranks) <= 0.75
        for module in opened.budget.modules:
            if module.name in opened.budget.left_dense:
                assert ranks[module.name] is None
        shared: dict[tuple[int, str], set[int | None]] = {}
        for module in opened.budget.free(("v",)):
            shared.setdefault((module.layer, module.type.name), set()).add(ranks[module.name])
        assert all(len(of_experts) == 1 for of_experts in shared.values())
        opened.sliced.set_ranks(ranks)
        model, account = tiny.model(kind), {}
        preset = {"kind": "bolaco", "calibration": "c", "covariance": "n", "validation": "v", "search": "s"}
        budget = Budget.of(shape)
        given_task = {"model": model, "budget": budget, "ratio": 25, "seed": 0, "bases": found, "account": account}
        assert compress_model("bolaco", preset, {**given_task, "allocation": ranks}) == ranks
        assert torch.allclose(model(TOKENS).logits, opened.sliced.model(TOKENS).logits, atol=1e-4)
        assert account["experts_left_dense"]


@pytest.mark.parametrize("kind", tiny.MIXTURES)
def test_single_matrices_and_single_types_are_tried_on_what_has_bases(kind: str, tmp_path: Path) -> None:
    tiny.tokenizer().save_pretrained(tmp_path / "tokenizer")
    save_checkpoint(tiny.model(kind), tmp_path / "tokenizer", tmp_path / "dense")
    found, given = bases(kind, True), {"dtype": "float32", "shape": shape_of(kind).plain()}
    opened = open_sliced_model(str(tmp_path / "dense"), str(found.files[0].parent), given, 1)
    chosen = choose_truncations(opened.budget, found, 14, [0.5], seed=0)
    types = ["q", "k", "v", "o", "gate", "up", "down"]
    assert Counter(each.module.type.name for each in chosen) == dict.fromkeys(types, 2)
    assert not {each.module.name for each in chosen} & opened.budget.left_dense
    assert len(measure_truncations(opened.sliced, chosen, TOKENS[:2], CPU)["truncations"]) == 14
    report = measure_sensitivity(opened.sliced, opened.budget, TOKENS[:2], [0.5], CPU)
    assert list(report["types"]) == types
    losses = predicted_losses(found, opened.budget)
    assert set(losses) == {module.name for module in opened.budget.modules} - opened.budget.left_dense


@pytest.mark.parametrize("kind", tiny.MIXTURES)
def test_loras_train_experts_and_merge_exactly(kind: str) -> None:
    model, _, _ = compressed(kind, DEFINED["rankwise"], 30)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    tuning = LoraTuning.model_validate(
        {"kind": "lora", "instructions": "i", "rank": 2, "alpha": 4, "dropout": 0.0, "steps": 200, "stages": ["all"]}
    )
    names = list(target_weights(model, None, "all"))
    assert any(".experts.2.down_proj" in name for name in names)
    wrapped = attach_lora(model, tuning, "all", 0)
    model(TOKENS).logits.square().mean().backward()
    with torch.no_grad():
        for layer in wrapped.values():
            side = layer.lora_B["default"].weight
            assert side.grad is not None  # of every expert
            side -= side.grad / side.grad.norm().clamp(min=1e-9)
    trained = model(TOKENS).logits
    merged, _, _ = compressed(kind, DEFINED["rankwise"], 30)
    merge_lora(merged, {name: learnt_matrices(layer) for name, layer in wrapped.items()}, 2.0)
    assert torch.allclose(merged(TOKENS).logits, trained, atol=1e-4)
    assert not torch.allclose(merged(TOKENS).logits, compressed(kind, DEFINED["rankwise"], 30)[0](TOKENS).logits)
    routers = [name for name in before if name.endswith("mlp.gate.weight")]
    assert routers
    assert all(torch.equal(merged.get_parameter(name), before[name]) for name in routers)


@pytest.mark.parametrize("kind", tiny.MIXTURES)
@pytest.mark.parametrize("rank", [None, 3])
def test_macs_are_those_of_the_experts_that_a_token_passes(kind: str, rank: int | None) -> None:
    """As torch counts them: every token passes as many experts, and here all of them cost the same."""
    model, shape = tiny.model(kind), shape_of(kind)
    modules = Budget.of(shape).modules
    if rank:
        pairs = {
            m.name: LowRankFactors(torch.randn(rank, m.in_features), torch.randn(m.out_features, rank)) for m in modules
        }
        replace_modules(model, pairs)
    with FlopCounterMode(display=False) as counter:
        model(TOKENS[:1, :11])
    counts = {name: sum(parts.values()) // 2 for name, parts in counter.get_flop_counts().items()}
    root = type(model).__name__
    names = [m.name for m in modules] + [f"model.layers.{layer}.mlp.gate" for layer in range(tiny.LAYERS)]
    linears = sum(counts.get(f"{root}.{name}", 0) for name in names)
    found = count_macs(model, shape, 11)
    assert found["linears"] == linears
    assert found["total"] - found["attention"] == linears + counts[f"{root}.lm_head"]
    assert count(shape, dict.fromkeys([m.name for m in modules], rank), 11).macs == found["total"]
