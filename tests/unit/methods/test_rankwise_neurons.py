"""`rankwise` with pruned MLPs: against the map written out, its budget, its prediction, checkpoints, errors."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from transformers import PreTrainedModel

from lowrank.calibration.output_gradients import OutputGradients, collect_output_gradients
from lowrank.calibration.statistics import Statistics, collect_statistics
from lowrank.compression.compress import compress_model
from lowrank.compression.eliminate_neurons import Eliminations
from lowrank.compression.neurons import Neurons
from lowrank.config.presets import Covariance
from lowrank.errors import RankwiseError
from lowrank.methods.rankwise import Settings
from lowrank.model.modeling_rankwise import IdentityBlockLinear
from lowrank.model.parameters import count_parameters
from lowrank.ranks.budget import ALIGNMENT, Budget, Ranks
from tests import tiny
from tests.unit.methods import rankwise_samples as samples
from tests.unit.model import factor_samples
from tests.unit.model.factor_samples import CPU, TOKENS, shape_of

KINDS = tuple(tiny.FEW)
ATTENTION = ["q", "k", "v", "o"]
PRESET = {"kind": "rankwise", "calibration": "c", "covariance": "c"}


@cache
def bases(kind: str, estimator: str) -> Any:
    preset = Covariance.model_validate({"estimator": estimator, "gradients": "weigh"})
    return samples.bases_of(tiny.model(kind), kind, TOKENS, preset)


@cache
def eliminations(kind: str, estimator: str, multiple: int) -> Eliminations:
    preset = Covariance.model_validate({"estimator": estimator, "gradients": "weigh"})
    calibrated = factor_samples.statistics(kind), factor_samples.output_gradients(kind)
    return samples.eliminations_of(tiny.model(kind), kind, calibrated, preset, multiple)


def compressed(
    kind: str, ratio: int, mlp: str = "neurons", estimator: str = "naive", **options: Any
) -> tuple[PreTrainedModel, Ranks, dict[str, Any]]:
    model, account = tiny.model(kind), {}
    task = {
        "model": model,
        "budget": Budget.of(shape_of(kind)),
        "ratio": ratio,
        "seed": 0,
        "bases": bases(kind, estimator),
        "statistics": factor_samples.statistics(kind),
        "gradients": factor_samples.output_gradients(kind),
        "covariance": Covariance.model_validate({"estimator": estimator, "gradients": "weigh"}),
        "eliminations": eliminations(kind, estimator, options.get("multiple", ALIGNMENT)),
        "tokens": TOKENS,
        "account": account,
    }
    ranks = compress_model("rankwise", {**PRESET, "mlp": mlp, **options}, task)
    return model, ranks, account


def mlp_layers(model: PreTrainedModel, kind: str, layer: int) -> list[Any]:
    names = [m.name for m in Budget.of(shape_of(kind)).modules if m.layer == layer and m.type.name not in ATTENTION]
    return [model.get_submodule(name) for name in names]


def kept_neurons(dense: Any, pruned: Any) -> list[int]:
    """Which rows of the first matrix are there."""
    return [int((dense.weight == row).all(dim=1).nonzero()) for row in pruned.weight]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("estimator", ["naive", "uncentred"])
def test_the_last_matrix_is_the_regression_of_its_output_on_the_neurons_that_stay(kind: str, estimator: str) -> None:
    """From the inputs of a plain pass, by numpy's least squares, with a damped row a neuron."""
    model, ranks, account = compressed(kind, 30, estimator=estimator)
    dense = tiny.model(kind)
    inputs = factor_samples.inputs_of_layers(dense)
    pruned_blocks = 0
    for layer in range(tiny.LAYERS):
        first, *_, last = mlp_layers(model, kind, layer)
        before, *_, reader = mlp_layers(dense, kind, layer)
        if account["neurons"]["kept"][layer] == tiny.INTERMEDIATE:
            continue
        pruned_blocks += 1
        kept = kept_neurons(before, first)
        assert kept == sorted(kept)
        name = next(
            m.name for m in Budget.of(shape_of(kind)).modules if m.layer == layer and m.type.input == "intermediate"
        )
        h = inputs[name].numpy()
        mean = h.mean(axis=0) if estimator == "naive" else np.zeros(h.shape[1])
        around = h - mean
        size = np.sqrt(0.01 * (around**2).sum(axis=0))
        x = np.vstack([around, np.diag(size)])
        w = reader.weight.double().numpy()
        expected = np.linalg.lstsq(x[:, kept], x @ w.T, rcond=None)[0].T
        scale = np.abs(w * h.std(axis=0)).max()
        assert np.allclose(
            last.weight.double().numpy() * h.std(axis=0)[kept], expected * h.std(axis=0)[kept], atol=1e-3 * scale
        )
        own = 0 if reader.bias is None else reader.bias.double().numpy()
        if estimator == "naive":
            assert np.allclose(last.bias.double().numpy(), own + w @ mean - expected @ mean[kept], atol=2e-3)
        else:
            assert (last.bias is None) == (reader.bias is None)
    assert pruned_blocks
    assert all(rank is None for name, rank in ranks.items() if ".mlp." in name or ".fc" in name)


@pytest.mark.parametrize("mlp", ["neurons", "both"])
@settings(max_examples=12, deadline=None)
@given(kind=st.sampled_from(KINDS), ratio=st.integers(1, 75), identity_block=st.booleans())
def test_the_budget_is_counted_on_the_model_and_hardly_missed(
    mlp: str, kind: str, ratio: int, identity_block: bool
) -> None:
    model, _, account = compressed(kind, ratio, mlp, identity_block=identity_block)
    counts = count_parameters(model, shape_of(kind))
    left = (1 - ratio / 100) * counts["decoder_linears_dense"] - counts["decoder_linears"]
    assert 0 <= left <= 8 * 3 * (tiny.HIDDEN + tiny.INTERMEDIATE)
    assert all(count % 8 == 0 for count in account["neurons"]["kept"])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mlp", ["neurons", "both"])
def test_a_checkpoint_is_the_model_and_nothing_removed_changes_nothing(kind: str, mlp: str, tmp_path: Path) -> None:
    factor_samples.check_round_trip(compressed(kind, 35, mlp)[0], tmp_path)
    model, ranks, _ = compressed(kind, 0, mlp)
    assert not any(ranks.values())
    assert torch.equal(model(TOKENS).logits, tiny.model(kind)(TOKENS).logits)


@pytest.mark.parametrize("ratio", [20, 40, 60])
@pytest.mark.parametrize("kind", ["llama-gqa", "opt"])
def test_a_wider_choice_is_never_predicted_to_lose_more(kind: str, ratio: int) -> None:
    """But for what rounding leaves: `both` has all choices of `neurons`, which has those of `widths: one`."""

    def predicted(mlp: str, **options: Any) -> float:
        account = compressed(kind, ratio, mlp, **options)[2]
        return float(account["predicted_loss_rise"]["nats_per_token"])

    both, pairs, own, one = (
        predicted("both"),
        predicted("pairs"),
        predicted("neurons"),
        predicted("neurons", widths="one"),
    )
    assert both <= 1.02 * own
    assert both <= 1.02 * pairs
    assert own <= 1.02 * one


def test_both_makes_pairs_of_the_neurons_that_are_left() -> None:
    model, ranks, account = compressed("llama", 60, "both")
    kinds = {type(layer) for block in range(tiny.LAYERS) for layer in mlp_layers(model, "llama", block)}
    assert min(account["neurons"]["kept"]) < tiny.INTERMEDIATE
    assert IdentityBlockLinear in kinds
    for module in Budget.of(shape_of("llama")).modules:
        layer, kept = model.get_submodule(module.name), account["neurons"]["kept"][module.layer]
        narrow = replace(module, out_features=kept) if module.type.output == "intermediate" else module
        narrow = replace(narrow, in_features=kept) if module.type.input == "intermediate" else narrow
        assert (layer.out_features, layer.in_features) == (narrow.out_features, narrow.in_features)
        rank = ranks[module.name]
        assert isinstance(layer, IdentityBlockLinear) == (rank is not None)
        assert rank is None or layer.rank == rank


@pytest.mark.parametrize("multiple", [8, 32])
def test_one_width_with_dense_attention_and_no_mean_is_a_model_of_another_size(multiple: int) -> None:
    """All that differs from the architecture is `intermediate_size`: the weights fit into its own classes."""
    model, ranks, account = compressed(
        "llama", 25, widths="one", multiple=multiple, uncompressed=ATTENTION, estimator="uncentred"
    )
    (width,) = set(account["neurons"]["kept"])
    assert width % multiple == 0
    assert width < tiny.INTERMEDIATE
    assert not any(ranks.values())
    dense = tiny.model("llama")
    config = dense.config
    config.intermediate_size = width
    plain = type(dense)(config).eval()
    plain.load_state_dict(model.state_dict())
    assert torch.allclose(plain(TOKENS).logits, model(TOKENS).logits, atol=1e-5)


@pytest.mark.parametrize("mlp", ["neurons", "both"])
def test_on_a_trained_model_it_loses_less_than_removing_the_same_without_refitting(
    mlp: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen, unseen = samples.rows_to_learn(64, 1001), samples.rows_to_learn(32, 1002)
    folder = tmp_path
    shape, preset = shape_of("llama"), Covariance.model_validate({"estimator": "naive", "gradients": "weigh"})
    collect_statistics(samples.trained_copy(), seen, 2, folder / "statistics", CPU)
    collect_output_gradients(samples.trained_copy(), seen, 2, folder / "gradients", CPU)
    calibrated = Statistics(folder / "statistics", shape), OutputGradients(folder / "gradients", shape)
    task = {
        "budget": Budget.of(shape),
        "ratio": 35,
        "seed": 0,
        "bases": samples.bases_of(samples.trained_copy(), "llama", seen, preset),
        "statistics": calibrated[0],
        "gradients": calibrated[1],
        "covariance": preset,
        "eliminations": samples.eliminations_of(samples.trained_copy(), "llama", calibrated, preset, ALIGNMENT),
        "tokens": seen,
    }

    def loss() -> float:
        model = samples.trained_copy()
        compress_model("rankwise", {**PRESET, "mlp": mlp, "uncompressed": ATTENTION}, task | {"model": model})
        assert mlp_layers(model, "llama", 0)[0].out_features < tiny.INTERMEDIATE
        return float(model(input_ids=unseen, labels=unseen).loss)

    refitted, dense = loss(), float(samples.trained_model()(input_ids=unseen, labels=unseen).loss)
    monkeypatch.setattr(Neurons, "refit", lambda self, kept: (self.weight[:, kept], torch.zeros(tiny.HIDDEN)))
    cut = loss()
    assert 0 < refitted - dense < 0.9 * (cut - dense)


def test_presets_that_make_no_sense_are_refused_with_the_key() -> None:
    for options, key in (
        ({"widths": "one"}, "widths"),
        ({"mlp": "both", "widths": "one"}, "widths"),
        ({"multiple": 64}, "multiple"),
        ({"mlp": "neurons", "widths": "one", "uncompressed": ATTENTION, "influence": False}, "influence"),
    ):
        with pytest.raises(ValidationError) as error:
            Settings.model_validate({**PRESET, **options})
        assert error.value.errors()[0]["ctx"]["key"] == key
    budget = Budget.of(shape_of("llama"))

    def misfits(ratio: int = 20, **options: Any) -> list[tuple[str, str]]:
        return list(Settings.model_validate({**PRESET, "mlp": "neurons", **options}).misfits(budget, ratio, None))

    assert misfits() == []
    assert misfits(uncompressed=["v", "gate"])[0][0] == "uncompressed"
    assert misfits(multiple=160)[0] == ("multiple", "160 leaves no choice to blocks of 160 neurons; take a smaller one")
    ((key, reason),) = misfits(80, uncompressed=ATTENTION)
    assert key == ""
    assert "8 neurons a block leave" in reason
    assert not Settings.model_validate({**PRESET, "mlp": "neurons", "uncompressed": ATTENTION}).has_pairs
    assert Settings.model_validate({**PRESET, "mlp": "neurons"}).has_pairs


def test_what_is_out_of_reach_stops_the_compression_too() -> None:
    with pytest.raises(RankwiseError, match="the fewest neurons that may stay"):
        compressed("llama", 80, uncompressed=ATTENTION)
