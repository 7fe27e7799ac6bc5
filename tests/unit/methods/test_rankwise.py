"""The method `rankwise` against its formulas written out, its budget, checkpoints; identity blocks for all methods."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedModel

from lowrank.bases.principal import Bases
from lowrank.compression.compress import compress_model
from lowrank.compression.influence import block_influence
from lowrank.config.presets import Covariance
from lowrank.errors import RankwiseError
from lowrank.methods import rankwise
from lowrank.methods.rankwise import Settings
from lowrank.model.modeling_rankwise import IdentityBlockLinear, LowRankLinear
from lowrank.model.parameters import count_parameters
from lowrank.ranks.budget import ALIGNMENT, Budget, Ranks
from lowrank.ranks.curves import choices_of
from lowrank.ranks.predicted_loss import allocate
from lowrank.search.loss_scales import predicted_losses
from tests import tiny
from tests.unit.calibration.test_output_gradients import by_autograd
from tests.unit.methods import rankwise_samples as samples
from tests.unit.model import factor_samples
from tests.unit.model.factor_samples import TOKENS, shape_of

KINDS = tuple(tiny.FEW)
PRESET = {"kind": "rankwise", "calibration": "c", "covariance": "c"}
PAIRS = ("svd", "fwsvd", "asvd", "svd-llm", "afm", "lord", "bolaco")


def compressed(
    kind: str, ratio: int, method: str = "rankwise", bases: Bases | None = None, **options: Any
) -> tuple[PreTrainedModel, Ranks]:
    model = tiny.model(kind)
    allocation = options.pop("allocation", None)
    given_to_it = {
        "model": model,
        "budget": Budget.of(shape_of(kind)),
        "ratio": ratio,
        "seed": 0,
        "bases": bases or samples.fisher_bases(kind),
        "statistics": factor_samples.statistics(kind),
        "tokens": TOKENS,
        "allocation": allocation,
        "account": options.pop("account", {}),
    }
    named = {} if method == "svd" else {"calibration": "c"}
    named |= {"covariance": "c"} if method in ("rankwise", "afm", "lord", "bolaco") else {}
    named |= {"validation": "v", "search": "s"} if method == "bolaco" else {}
    return model, compress_model(method, {"kind": method, **named, **options}, given_to_it)


def budget_of(kind: str, identity_block: bool = True) -> Budget:
    return replace(Budget.of(shape_of(kind)), identity_block=identity_block)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("identity_block", [True, False])
def test_every_layer_is_the_cheapest_map_of_its_rank(kind: str, identity_block: bool) -> None:
    """Bias and product of both factors, from the inputs and gradients of plain passes."""
    dense = tiny.model(kind)
    inputs, gradients = factor_samples.inputs_of_layers(dense), by_autograd(tiny.model(kind).double(), TOKENS)
    model, ranks = compressed(kind, 30, identity_block=identity_block)
    assert any(ranks.values())
    for module in Budget.of(shape_of(kind)).modules:
        rank, layer = ranks[module.name], model.get_submodule(module.name)
        original = dense.get_submodule(module.name)
        if rank is None:
            assert torch.equal(layer.weight, original.weight)
            continue
        assert isinstance(layer, IdentityBlockLinear if identity_block else LowRankLinear)
        x, g = inputs[module.name], gradients[module.layer, module.type.name].numpy()
        y = (x @ original.weight.double().T + (0 if original.bias is None else original.bias.double())).numpy()
        root = scipy.linalg.sqrtm(g + 0.01 * np.diag(np.diag(g))).real  # the symmetric one
        centred = (y - y.mean(0)) @ root
        kept = factor_samples.truncation(torch.from_numpy(centred), rank).numpy()
        expected = y.mean(0) + kept @ np.linalg.inv(root)
        got = layer.double()(x).numpy()
        assert np.allclose(got, expected, atol=5e-4 * np.abs(y).max()), module.name


@pytest.mark.parametrize("kind", KINDS)
def test_a_ratio_of_zero_changes_nothing(kind: str) -> None:
    model, ranks = compressed(kind, 0)
    assert not any(ranks.values())
    assert torch.equal(model(TOKENS).logits, tiny.model(kind)(TOKENS).logits)


@settings(max_examples=30, deadline=None)
@given(kind=st.sampled_from(KINDS), ratio=st.integers(1, 75), identity_block=st.booleans())
def test_the_budget_is_counted_on_the_model_and_hardly_missed(kind: str, ratio: int, identity_block: bool) -> None:
    model, ranks = compressed(kind, ratio, identity_block=identity_block)
    shape, budget, dense = shape_of(kind), budget_of(kind, identity_block), tiny.model(kind)
    by_shapes = 0
    for module in budget.modules:
        m, n, rank = module.out_features, module.in_features, ranks[module.name]
        new_bias = 0 if dense.get_submodule(module.name).bias is not None else m
        saved = (rank or 0) * ((rank or 0) - 1) if identity_block else 0
        by_shapes += m * n if rank is None else rank * (m + n) - saved + new_bias
    counts = count_parameters(model, shape)
    assert counts["decoder_linears"] == by_shapes
    assert by_shapes <= (1 - ratio / 100) * counts["decoder_linears_dense"]
    assert counts["total_dense"] - counts["total"] == counts["decoder_linears_dense"] - by_shapes
    left = (1 - ratio / 100) * counts["decoder_linears_dense"] - by_shapes
    for module in budget.modules:  # nothing that is left pays for a step that would lower the predicted loss
        losses = samples.fisher_bases(kind).losses(module.layer, module.type.name)
        rank = ranks[module.name]
        if rank is not None and losses is not None:
            choices = choices_of(budget, module, losses.double().numpy())
            step = choices.parameters[choices.ranks.index(rank) + 1] - budget.cost(module, rank)
            assert step > left


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("identity_block", [True, False])
def test_a_checkpoint_is_the_model(kind: str, identity_block: bool, tmp_path: Path) -> None:
    model, _ = compressed(kind, 25, identity_block=identity_block)
    factor_samples.check_round_trip(model, tmp_path)


def test_it_says_what_its_ranks_are_predicted_to_cost_and_what_that_is(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rankwise, "INFLUENCE_WINDOWS", 5)
    account: dict[str, Any] = {}
    with caplog.at_level("INFO"):
        _, ranks = compressed("llama-gqa", 30, account=account)
    expected = 0.0
    for module in Budget.of(shape_of("llama-gqa")).modules:
        losses, rank = samples.fisher_bases("llama-gqa").losses(module.layer, module.type.name), ranks[module.name]
        assert losses is not None
        expected += 0.0 if rank is None else sum(losses.tolist()[rank:])
    assert expected > 0
    meaning = "second order, on the calibration text"
    said = {"nats_per_token": pytest.approx(expected, rel=1e-5), "meaning": meaning}
    assert account.pop("predicted_loss_rise") == said
    assert account == {"influence": block_influence(tiny.model("llama-gqa"), TOKENS[:5], factor_samples.CPU)}
    assert f"{expected:.4f} nats per token ({meaning};" in caplog.text


def test_blocks_are_compared_by_their_influence_too_unless_that_is_switched_off() -> None:
    kind = "llama-gqa"
    losses = predicted_losses(samples.fisher_bases(kind), budget_of(kind))
    budget = replace(budget_of(kind), adds_bias=True)
    influence = block_influence(tiny.model(kind), TOKENS, factor_samples.CPU)
    both, alone = (compressed(kind, 30, influence=used)[1] for used in (True, False))
    assert both == allocate(budget, 30, losses, influence=influence).ranks
    assert alone == allocate(budget, 30, losses).ranks
    assert both != alone
    assert Settings.model_validate({**PRESET, "influence": False}).needs == ()
    assert Settings.model_validate(PRESET).needs == ("tokens",)


def test_types_can_stay_dense() -> None:
    _, ranks = compressed("llama-gqa", 25, uncompressed=["v", "o"])
    assert {"v_proj", "o_proj"} <= {name.rsplit(".", 1)[1] for name, rank in ranks.items() if rank is None}
    with pytest.raises(RankwiseError, match="no linear layers of type w"):
        compressed("llama-gqa", 25, uncompressed=["w"])


def test_bases_that_know_nothing_of_the_loss_are_refused() -> None:
    plain = samples.bases_of(tiny.model("llama"), "llama", TOKENS, Covariance(estimator="naive"))
    with pytest.raises(RankwiseError, match=r"layers\.0\.self_attn\.q_proj: its basis says nothing of the loss"):
        compressed("llama", 20, bases=plain)


@pytest.mark.parametrize("ratio", [20, 40])
def test_on_a_trained_model_it_loses_less_than_principal_directions_at_one_ratio(ratio: int) -> None:
    settings = Covariance(estimator="naive", gradients="weigh")
    seen, unseen = samples.rows_to_learn(64, 1001), samples.rows_to_learn(32, 1002)
    bases = samples.bases_of(samples.trained_copy(), "llama", seen, settings)
    plain = samples.bases_of(samples.trained_copy(), "llama", seen, Covariance(estimator="naive"))
    budget, losses = Budget.of(shape_of("llama")), {}
    for method, used in (("rankwise", bases), ("afm", plain)):
        model = samples.trained_copy()
        task = {"model": model, "budget": budget, "ratio": ratio, "seed": 0, "bases": used, "tokens": seen}
        compress_model(method, {"kind": method, "calibration": "c", "covariance": "c"}, task)
        losses[method] = float(model(input_ids=unseen, labels=unseen).loss)
    dense = float(samples.trained_model()(input_ids=unseen, labels=unseen).loss)
    assert dense < losses["rankwise"]
    assert losses["rankwise"] - dense < 0.6 * (losses["afm"] - dense)


def all_directions(kind: str) -> Bases:
    return samples.bases_of(tiny.model(kind), kind, TOKENS, Covariance(estimator="naive", directions="all"))


@pytest.mark.parametrize("method", PAIRS)
@pytest.mark.parametrize("kind", ["llama-gqa", "opt"])
@pytest.mark.parametrize("ratio", [20, 45])
def test_every_low_rank_method_can_have_identity_blocks(method: str, kind: str, ratio: int) -> None:
    """Within the same budget, at larger ranks, with the map that the method makes at these ranks."""
    bases, budget = all_directions(kind), budget_of(kind)
    options: dict[str, Any] = {"bases": bases}
    if method == "bolaco":  # its search chooses the ranks
        share = 1 - ratio / 100 - 0.02
        options["allocation"] = {module.name: int(budget.rank_of_share(module, share)) for module in budget.modules}
    model, ranks = compressed(kind, ratio, method, identity_block=True, **options)
    shape = shape_of(kind)
    counts = count_parameters(model, shape)
    adds_bias = method in ("afm", "lord", "bolaco")
    assert counts["decoder_linears"] == replace(budget, adds_bias=adds_bias).parameters(ranks)
    assert counts["decoder_linears"] <= (1 - ratio / 100) * counts["decoder_linears_dense"]
    kinds = {type(model.get_submodule(name)) for name, rank in ranks.items() if rank is not None}
    assert kinds == {IdentityBlockLinear}
    if method in ("bolaco", "asvd"):  # whose ranks are searched
        return
    _, plain = compressed(kind, ratio, method, **options)
    assert sum(rank or 0 for rank in ranks.values()) > sum(rank or 0 for rank in plain.values())
    missing = (1 - ratio / 100) * counts["decoder_linears_dense"] - counts["decoder_linears"]
    largest_step = tiny.LAYERS * ALIGNMENT * max(m.out_features + m.in_features for m in budget.modules)
    assert missing <= largest_step


@pytest.mark.parametrize("kind", KINDS)
def test_the_block_changes_the_form_and_not_the_map(kind: str) -> None:
    """The same ranks as plain pairs give the same logits."""
    bases = all_directions(kind)
    budget = budget_of(kind, identity_block=False)
    ranks = {module.name: int(budget.rank_of_share(module, 0.6)) for module in budget.modules}
    answers = [
        compressed(kind, 20, "bolaco", bases=bases, allocation=ranks, identity_block=block)[0](TOKENS).logits
        for block in (True, False)
    ]
    assert torch.allclose(*answers, atol=1e-4)
    assert not torch.allclose(answers[0], tiny.model(kind)(TOKENS).logits, atol=0.1)


@settings(max_examples=60, deadline=None)
@given(kind=st.sampled_from(KINDS), share=st.floats(0.01, 1), index=st.integers(0, 6))
def test_the_rank_of_a_share_costs_that_share(kind: str, share: float, index: int) -> None:
    for identity_block in (True, False):
        budget = replace(budget_of(kind, identity_block), adds_bias=False)
        module = budget.modules[index % len(budget.modules)]
        rank = budget.rank_of_share(module, share)
        below, above = (budget.cost(module, whole) for whole in (int(rank), int(rank) + 1))
        assert below <= share * module.parameters + 1e-6
        assert above >= share * module.parameters - 1e-6
