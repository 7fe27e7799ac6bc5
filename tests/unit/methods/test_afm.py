"""AFM: principal component analysis of the outputs of every layer, with the bias, at one ratio for all."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lowrank.errors import RankwiseError
from tests import tiny
from tests.unit.model import factor_samples as samples


@pytest.mark.parametrize("kind", tiny.FEW)
def test_every_layer_projects_its_centred_outputs(kind: str) -> None:
    dense = tiny.model(kind)
    inputs = samples.inputs_of_layers(dense)
    model, ranks = samples.compressed("afm", kind, 30)
    assert any(rank for name, rank in ranks.items() if "v_proj" in name), "AFM compresses v too"
    for name, rank in ranks.items():
        if rank is None:
            continue
        layer, x = dense.get_submodule(name), inputs[name]
        y = x @ layer.weight.double().T + (0 if layer.bias is None else layer.bias.double())
        expected = y.mean(0) + samples.truncation(y - y.mean(0), rank)
        got = x @ samples.product(model, name).T + model.get_submodule(name).up.bias.double()
        assert torch.allclose(got, expected, atol=2e-4 * float(y.abs().max())), name


@pytest.mark.parametrize("kind", tiny.FEW)
def test_a_ratio_of_zero_changes_nothing(kind: str) -> None:
    samples.check_unchanged_at_ratio_zero("afm", kind)


@settings(max_examples=40, deadline=None)
@given(kind=st.sampled_from(list(tiny.FEW)), ratio=st.integers(5, 70))
def test_the_budget_holds_with_the_biases(kind: str, ratio: int) -> None:
    samples.check_budget("afm", kind, ratio, adds_bias=True)


@settings(max_examples=40, deadline=None)
@given(kind=st.sampled_from(list(tiny.FEW)), ratio=st.integers(5, 70))
def test_uncentred_bases_leave_all_of_the_budget_to_ranks(kind: str, ratio: int) -> None:
    samples.check_budget("afm", kind, ratio, adds_bias=False, estimator="uncentred")


@pytest.mark.parametrize("kind", tiny.FEW)
def test_a_checkpoint_is_the_model(kind: str, tmp_path: Path) -> None:
    model, _ = samples.compressed("afm", kind, 25)
    samples.check_round_trip(model, tmp_path)


def test_types_can_stay_dense() -> None:
    _, ranks = samples.compressed("afm", "llama-gqa", 25, uncompressed=["v", "o"])
    dense = {name.rsplit(".", 1)[1] for name, rank in ranks.items() if rank is None}
    assert {"v_proj", "o_proj"} <= dense
    with pytest.raises(RankwiseError, match="no linear layers of type w"):
        samples.compressed("afm", "llama-gqa", 25, uncompressed=["w"])
