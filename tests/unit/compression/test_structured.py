"""Pruned models against dense models whose lost channels are masked; the counts against naive loops over units."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedModel

from lowrank.compression.branches import LEAST_NEURONS, Place, Structure, even_removal
from lowrank.compression.structured import channels, cut, kept_units, lowest_removal, lowest_units
from lowrank.config.sources import ModelShape
from lowrank.errors import RankwiseError
from lowrank.model.checkpoint import replace_modules
from lowrank.model.parameters import count_parameters
from lowrank.ranks.budget import Budget
from tests import tiny
from tests.unit.ranks.test_budget import LLAMA_7B, LLAMA_13B

LLAMA_3_8B = LLAMA_7B.model_copy(update={"intermediate": 14336, "kv_heads": 8, "vocabulary": 128256})
QWEN3 = ModelShape(  # Qwen3-0.6B: query heads are wider together than the hidden state
    family="qwen3",
    layers=28,
    hidden=1024,
    intermediate=3072,
    heads=16,
    kv_heads=8,
    head_dim=128,
    vocabulary=151936,
    tied_embeddings=True,
)
OPT_125M = ModelShape(
    family="opt",
    layers=12,
    hidden=768,
    intermediate=3072,
    heads=12,
    kv_heads=12,
    head_dim=64,
    vocabulary=50272,
    tied_embeddings=True,
)
SHAPES = {
    "llama-2-7b": LLAMA_7B,
    "llama-2-13b": LLAMA_13B,
    "llama-3.1-8b": LLAMA_3_8B,
    "qwen3-0.6b": QWEN3,
    "opt-125m": OPT_125M,
    "smollm2-135m": ModelShape(**tiny.SMOLLM),
}


def structure_of(kind: str, adds_bias: bool = True) -> Structure:
    return Structure.of(replace(Budget.of(ModelShape(**tiny.shape(kind))), adds_bias=adds_bias))


def mask_channels(
    model: PreTrainedModel,
    structure: Structure,
    kept: dict[Place, torch.Tensor],
    means: dict[Place, torch.Tensor] | None,
) -> None:
    """What pruning must amount to: columns of o and down are zero, and what they read on average is added."""
    for place, units in kept.items():
        branch = structure.branch(place)
        name = structure.layer_name(place[0], branch.reader)
        layer = model.get_submodule(name)
        added = torch.zeros(layer.out_features, dtype=torch.float64)
        for channel in range(layer.in_features):
            if channel // branch.reader_width not in units.tolist():
                if means is not None:
                    added += layer.weight[:, channel].double() * means[place][channel]
                layer.weight.data[:, channel] = 0
        if means is not None:
            own = torch.zeros_like(added) if layer.bias is None else layer.bias.detach().double()
            layer.bias = torch.nn.Parameter((own + added).to(layer.weight.dtype), requires_grad=False)


def some_units(structure: Structure, seed: int) -> dict[Place, torch.Tensor]:
    """Random units that stay, other ones in each branch; the first MLP loses nothing."""
    generator = torch.Generator().manual_seed(seed)
    kept = {}
    for place, branch in structure.places():
        if place != (0, "mlp"):
            count = int(torch.randint(branch.least, branch.units + 1, (1,), generator=generator))
            kept[place] = torch.randperm(branch.units, generator=generator)[:count].sort().values
    kept[1, "attention"] = torch.tensor([structure.attention.units - 1])
    return {place: units for place, units in kept.items() if len(units) < structure.branch(place).units}


@pytest.mark.parametrize("kind", tiny.HEADS_GO)
@pytest.mark.parametrize("compensated", [True, False])
def test_a_pruned_model_is_the_dense_one_with_its_channels_masked(kind: str, compensated: bool) -> None:
    structure = structure_of(kind, adds_bias=compensated)
    kept = some_units(structure, seed=4)
    means = None
    if compensated:
        generator = torch.Generator().manual_seed(5)
        means = {
            place: torch.randn(branch.units * branch.reader_width, generator=generator, dtype=torch.float64)
            for place, branch in structure.places()
        }
    masked, pruned = tiny.model(kind), tiny.model(kind)
    mask_channels(masked, structure, kept, means)
    replace_modules(pruned, cut(pruned, structure, kept, means))
    ids = torch.randint(2, 400, (2, 14), generator=torch.Generator().manual_seed(6))
    assert not torch.allclose(masked(ids).logits, tiny.model(kind)(ids).logits, atol=1e-2)
    assert torch.allclose(pruned(ids).logits, masked(ids).logits, atol=1e-4)


@pytest.mark.parametrize("kind", tiny.HEADS_GO)
@pytest.mark.parametrize("compensated", [True, False])
def test_what_remains_is_what_a_written_model_holds(kind: str, compensated: bool) -> None:
    structure = structure_of(kind, adds_bias=compensated)
    shape = ModelShape(**tiny.shape(kind))
    for seed in range(4):
        model, kept = tiny.model(kind), some_units(structure, seed)
        width = {place: branch.units * branch.reader_width for place, branch in structure.places()}
        means = {place: torch.zeros(width[place]) for place in kept} if compensated else None
        replacements = cut(model, structure, kept, means)
        assert {name for name in replacements if ".0.mlp." in name or ".0.fc" in name} == set()
        replace_modules(model, replacements)
        removed = {place: structure.branch(place).units - len(units) for place, units in kept.items()}
        assert structure.remaining(removed) == count_parameters(model, shape)["decoder_linears"]


@pytest.mark.parametrize(
    ("name", "group", "neuron"),
    [
        ("llama-2-7b", 4 * 128 * 4096, 3 * 4096),  # 170.67 neurons a head
        ("llama-3.1-8b", (2 * 4 + 2) * 128 * 4096, 3 * 4096),
        ("qwen3-0.6b", (2 * 2 + 2) * 128 * 1024, 3 * 1024),
        ("opt-125m", 4 * 64 * 768, 2 * 768),
    ],
)
def test_the_cost_of_units_follows_from_shapes(name: str, group: int, neuron: int) -> None:
    structure = Structure.of(Budget.of(SHAPES[name]))
    assert (structure.attention.cost, structure.mlp.cost) == (group, neuron)
    blocks = SHAPES[name].layers * (structure.attention.units * group + structure.mlp.units * neuron)
    assert blocks == structure.budget.dense_parameters
    native = name == "opt-125m"
    assert structure.attention.added_bias == structure.mlp.added_bias == (0 if native else SHAPES[name].hidden)


@settings(max_examples=60, deadline=None)
@given(
    name=st.sampled_from(sorted(SHAPES)),
    ratio=st.integers(1, 85),
    adds_bias=st.booleans(),
    skip=st.sampled_from([(0, 0), (1, 1), (4, 2)]),
)
def test_an_even_removal_meets_the_budget_within_a_neuron(
    name: str, ratio: int, adds_bias: bool, skip: tuple[int, int]
) -> None:
    budget = replace(Budget.of(SHAPES[name]), adds_bias=adds_bias)
    structure = Structure.of(budget)
    layers = range(skip[0], SHAPES[name].layers - skip[1])
    allowed = budget.allowed(ratio)
    floor = structure.remaining({place: branch.most for place, branch in structure.places(layers)})
    if floor > allowed:
        with pytest.raises(RankwiseError, match=f"removing {ratio} % is out of reach"):
            even_removal(structure, allowed, layers)
        return
    removed = even_removal(structure, allowed, layers)
    assert allowed - structure.mlp.cost < structure.remaining(removed) <= allowed
    assert {layer for layer, _ in removed} == set(layers)
    groups = {removed[layer, "attention"] for layer in layers}
    neurons = [removed[layer, "mlp"] for layer in layers]
    assert len(groups) == 1
    assert max(neurons) - min(neurons) <= 1
    assert min(neurons) >= 0
    assert max(neurons) <= SHAPES[name].intermediate - LEAST_NEURONS
    assert 0 <= max(groups) < structure.attention.units
    # As even as whole groups allow: one group more or less would not bring the two shares nearer.
    gap = abs(max(groups) / structure.attention.units - np.mean(neurons) / structure.mlp.units)
    step = (1 + structure.attention.units * structure.attention.cost / structure.mlp.units / structure.mlp.cost) / 2
    limited = max(neurons) > SHAPES[name].intermediate - LEAST_NEURONS - 2 or max(groups) == structure.attention.most
    assert limited or gap <= step / structure.attention.units + 0.01


def test_a_number_of_groups_that_overshoots_is_refused() -> None:
    structure = Structure.of(Budget.of(LLAMA_7B))
    allowed = structure.budget.allowed(5)
    assert {even_removal(structure, allowed, groups=2)[layer, "attention"] for layer in range(32)} == {2}
    with pytest.raises(RankwiseError, match="each block loses 20 of 32 key/value heads"):
        even_removal(structure, allowed, groups=20)


def naive_removal(structure: Structure, scores: dict[Place, torch.Tensor], allowed: float) -> set[tuple[Place, int]]:
    """Walk over all units from the lowest score, as a person would; for budgets that neurons alone can finish."""
    order = sorted((float(value), place, unit) for place, values in scores.items() for unit, value in enumerate(values))
    gone: set[tuple[Place, int]] = set()

    def weight() -> int:
        total = structure.budget.dense_parameters
        for place, branch in structure.places():
            lost = sum(1 for where, _ in gone if where == place)
            total -= lost * branch.cost - (branch.added_bias if lost else 0)
        return total

    for _, place, unit in order:
        if weight() <= allowed:
            break
        branch = structure.branch(place)
        if sum(1 for where, _ in gone if where == place) == branch.units - branch.least:
            continue
        gone.add((place, unit))
        if place[1] == "attention" and weight() < allowed:
            gone.remove((place, unit))
    for _, place, unit in reversed(order):
        if (place, unit) in gone and place[1] == "mlp":
            gone.remove((place, unit))
            if weight() > allowed:
                gone.add((place, unit))
    return gone


def random_scores(structure: Structure, seed: int) -> dict[Place, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        place: torch.randn(branch.units, generator=generator, dtype=torch.float64)
        for place, branch in structure.places()
    }


@settings(max_examples=25, deadline=None)
@given(kind=st.sampled_from(sorted(tiny.HEADS_GO)), ratio=st.integers(1, 60), seed=st.integers(0, 99))
def test_a_threshold_removes_what_a_walk_over_all_units_removes(kind: str, ratio: int, seed: int) -> None:
    structure = structure_of(kind)
    scores = random_scores(structure, seed)
    allowed = structure.budget.allowed(ratio)
    removed = lowest_removal(structure, scores, allowed)
    expected = naive_removal(structure, scores, allowed)
    kept = kept_units(scores, removed)
    gone = {
        (place, unit)
        for place, units in kept.items()
        for unit in range(structure.branch(place).units)
        if unit not in units.tolist()
    }
    assert gone == expected
    assert allowed - structure.mlp.cost < structure.remaining(removed) <= allowed


@settings(max_examples=60, deadline=None)
@given(
    kind=st.sampled_from(sorted(tiny.HEADS_GO)),
    ratio=st.integers(1, 90),
    seed=st.integers(0, 999),
    tilt=st.floats(-3, 3),
)
def test_a_threshold_never_exceeds_the_budget_nor_empties_a_branch(
    kind: str, ratio: int, seed: int, tilt: float
) -> None:
    """`tilt` moves all scores of attention, so that one branch may run out long before the other is touched."""
    structure = structure_of(kind)
    scores = {p: s + (tilt if p[1] == "attention" else 0) for p, s in random_scores(structure, seed).items()}
    allowed = structure.budget.allowed(ratio)
    floor = structure.remaining({place: branch.most for place, branch in structure.places()})
    if floor > allowed:
        with pytest.raises(RankwiseError, match="is out of reach"):
            lowest_removal(structure, scores, allowed)
        return
    removed = lowest_removal(structure, scores, allowed)
    left = structure.remaining(removed)
    assert left <= allowed
    for place, branch in structure.places():
        assert 0 <= removed.get(place, 0) <= branch.units - branch.least
    if any(removed.get(place, 0) for place, branch in structure.places() if branch is structure.mlp):
        assert left > allowed - structure.mlp.cost


def test_equal_scores_go_in_the_order_of_the_model() -> None:
    structure = structure_of("llama")
    scores = {place: torch.zeros(branch.units) for place, branch in structure.places()}
    counts = lowest_units(structure, {p: s for p, s in scores.items() if p[1] == "mlp"}, 160)
    assert counts == {(0, "mlp"): 160 - LEAST_NEURONS, (1, "mlp"): LEAST_NEURONS}
    kept = kept_units(scores, counts)
    assert kept[0, "mlp"].tolist() == list(range(152, 160))
    assert kept[1, "mlp"].tolist() == list(range(8, 160))
    with pytest.raises(RankwiseError, match="400 units are to go, but only 304 can"):
        lowest_units(structure, {p: s for p, s in scores.items() if p[1] == "mlp"}, 400)


def test_channels_of_units_are_consecutive() -> None:
    assert channels(torch.tensor([0, 2]), 3).tolist() == [0, 1, 2, 6, 7, 8]
