"""FLAP: scores and choice against loops over channels and units, bias compensation, the budget, round trips."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from transformers import PreTrainedModel

from lowrank.calibration.moments import Moments
from lowrank.calibration.statistics import Statistics, collect_statistics
from lowrank.compression.branches import Place, Structure
from lowrank.compression.compress import compress_model
from lowrank.config.sources import ModelShape
from lowrank.errors import RankwiseError
from lowrank.files import layer_name, save_tensors
from lowrank.methods.flap import Settings
from lowrank.model.checkpoint import family_of, load_checkpoint, recipe_of, save_checkpoint
from lowrank.model.parameters import count_parameters
from lowrank.ranks.budget import Budget
from tests import tiny
from tests.unit.compression.test_structured import mask_channels, naive_removal

FOLDER = TemporaryDirectory()  # of the statistics, one folder a model; goes when Python does
PRESET: dict[str, Any] = {"kind": "flap", "calibration": "c"}
STRUCTURES: list[dict[str, Any]] = [
    {"structure": "AL-AM"},
    {"structure": "UL-UM"},
    {"structure": "AL-MM", "remove_heads": 2},
    {"structure": "UL-MM", "remove_heads": 4},
]


def some_tokens(windows: int = 6, length: int = 20) -> torch.Tensor:
    return torch.randint(2, 400, (windows, length), generator=torch.Generator().manual_seed(8))


@cache
def statistics_of(kind: str) -> Statistics:
    folder = Path(FOLDER.name) / kind
    for layer, file in enumerate(collect_statistics(tiny.model(kind), some_tokens(), 2, folder, torch.device("cpu"))):
        (folder / "layers").mkdir(exist_ok=True)
        file.rename(folder / "layers" / layer_name(layer))
    return Statistics(folder / "layers", ModelShape(**tiny.shape(kind)))


def pruned(kind: str, ratio: int = 30, statistics: Statistics | None = None, **changes: Any) -> PreTrainedModel:
    model = tiny.model(kind)
    task = {
        "model": model,
        "budget": Budget.of(ModelShape(**tiny.shape(kind))),
        "ratio": ratio,
        "seed": 0,
        "statistics": statistics or statistics_of(kind),
    }
    ranks = compress_model("flap", PRESET | changes, task)
    assert not any(ranks.values())
    return model


@pytest.mark.parametrize("kind", tiny.HEADS_GO)
@pytest.mark.parametrize("changes", STRUCTURES, ids=lambda changes: changes["structure"])
def test_ratio_0_changes_nothing(kind: str, changes: dict[str, Any]) -> None:
    ids = some_tokens(2)
    model = pruned(kind, 0, **changes)
    assert recipe_of(model) == {}
    assert torch.equal(model(ids).logits, tiny.model(kind)(ids).logits)


def readers_inputs(kind: str) -> dict[str, np.ndarray]:
    """All tokens that o and down read, from a plain forward pass: layer name -> tokens x n, in float64."""
    model = tiny.model(kind)
    seen: dict[str, np.ndarray] = {}
    for layer in range(tiny.LAYERS):
        for linear in family_of(model).types:
            if linear.output == "hidden":
                name = f"{family_of(model).blocks}.{layer}.{linear.path}"

                def record(module: torch.nn.Module, args: tuple[torch.Tensor], to: str = name) -> None:
                    seen[to] = args[0].double().reshape(-1, args[0].shape[-1]).numpy()

                model.get_submodule(name).register_forward_pre_hook(record)
    model(some_tokens())
    return seen


def scores_by_loops(kind: str, metric: str, square: bool) -> dict[Place, torch.Tensor]:
    """Channel by channel, from the tokens themselves."""
    shape, model = ModelShape(**tiny.shape(kind)), tiny.model(kind)
    scores: dict[Place, torch.Tensor] = {}
    for name, x in readers_inputs(kind).items():
        weight = model.get_submodule(name).weight.double().numpy()
        values = []
        for j in range(x.shape[1]):
            variance = ((x[:, j] - x[:, j].mean()) ** 2).sum() / (len(x) - 1)
            value = {
                "ifv": variance,
                "wifv": variance * (weight[:, j] ** 2).sum(),
                "wifn": np.abs(weight[:, j]).mean() * np.linalg.norm(x[:, j]),
            }[metric]
            attention = "self_attn" in name
            values.append(value**2 if attention and square else value)
        z = (np.array(values) - np.mean(values)) / np.std(values, ddof=1)
        place = (int(name.split("layers.")[1].split(".")[0]), "attention" if attention else "mlp")
        if attention:
            width = shape.heads // shape.kv_heads * shape.head_dim
            z = np.array([z[group * width : (group + 1) * width].mean() for group in range(shape.kv_heads)])
        scores[place] = torch.tensor(z)
    return scores


def complement(structure: Structure, gone: set[tuple[Place, int]]) -> dict[Place, torch.Tensor]:
    kept = {}
    for place, branch in structure.places():
        lost = [unit for where, unit in gone if where == place]
        if lost:
            kept[place] = torch.tensor([unit for unit in range(branch.units) if unit not in lost])
    return kept


def means_by_loops(kind: str, structure: Structure) -> dict[Place, torch.Tensor]:
    inputs = readers_inputs(kind)
    return {
        place: torch.tensor(inputs[structure.layer_name(place[0], branch.reader)].mean(axis=0))
        for place, branch in structure.places()
    }


def require_equal(kind: str, model: PreTrainedModel, gone: set[tuple[Place, int]]) -> None:
    """The pruned model is the dense one with those units masked, and a bias for what they were on average."""
    structure = Structure.of(Budget.of(ModelShape(**tiny.shape(kind))))
    masked = tiny.model(kind)
    mask_channels(masked, structure, complement(structure, gone), means_by_loops(kind, structure))
    ids = some_tokens(3)
    assert torch.allclose(model(ids).logits, masked(ids).logits, atol=1e-4)


@pytest.mark.parametrize("kind", tiny.HEADS_GO)
@pytest.mark.parametrize(("metric", "square"), [("wifv", True), ("wifv", False), ("ifv", True), ("wifn", True)])
@pytest.mark.parametrize("ratio", [20, 60])
def test_one_threshold_for_all_blocks(kind: str, metric: str, square: bool, ratio: int) -> None:
    budget = Budget.of(ModelShape(**tiny.shape(kind)))
    structure = Structure.of(budget)
    gone = naive_removal(structure, scores_by_loops(kind, metric, square), budget.allowed(ratio))
    assert gone
    if metric == "ifv":
        assert {branch for (_, branch), _ in gone} == ({"attention", "mlp"} if ratio == 60 else {"mlp"})
    require_equal(kind, pruned(kind, ratio, metric=metric, square_attention=square), gone)


def changed_statistics(folder: Path, change: Callable[[int, str, Moments], Moments], kind: str = "llama") -> Statistics:
    """The statistics of a model with other moments at some sites."""
    statistics = statistics_of(kind)
    for layer in range(tiny.LAYERS):
        tensors: dict[str, torch.Tensor] = {}
        for site, moments in statistics.of(layer).items():
            tensors |= change(layer, site, moments).tensors(site)
        save_tensors(folder / layer_name(layer), tensors)
    return Statistics(folder, statistics.shape)


def test_squaring_favours_heads_with_a_few_strong_channels(tmp_path: Path) -> None:
    """Head 1: all channels 2. Head 2: half of them 3.2, half 0.4, so less on average, but more on average squared."""
    variances = torch.tensor([5.0] * 16 + [2.0] * 16 + [3.2] * 8 + [0.4] * 8 + [5.0] * 16)

    def change(layer: int, site: str, moments: Moments) -> Moments:
        if site != "attention_output":
            return moments
        same = torch.zeros_like(moments.window_means)
        return Moments(torch.diag(variances), same, moments.absolute_mean, moments.window_length)

    statistics = changed_statistics(tmp_path, change)
    rows = tiny.model("llama").model.layers[0].self_attn.q_proj.weight.split(tiny.HEAD_DIM)
    for square, gone in ((True, 1), (False, 2)):
        model = pruned("llama", 25, statistics, metric="ifv", structure="UL-UM", square_attention=square)
        kept = [row for head, row in enumerate(rows) if head != gone]
        assert torch.equal(model.model.layers[0].self_attn.q_proj.weight, torch.cat(kept))


@pytest.mark.parametrize("kind", tiny.HEADS_GO)
def test_a_fixed_number_of_heads_and_the_rest_from_neurons(kind: str) -> None:
    """AL-MM: the lowest two query heads' worth of groups of the whole model, then the lowest neurons."""
    shape = ModelShape(**tiny.shape(kind))
    budget = Budget.of(shape)
    structure = Structure.of(budget)
    scores = scores_by_loops(kind, "wifv", True)
    order = sorted((float(v), p, i) for p, s in scores.items() if p[1] == "attention" for i, v in enumerate(s))
    groups = 2 * shape.kv_heads // shape.heads
    gone = {(place, unit) for _, place, unit in order[:groups]}
    left = structure.remaining({p: sum(1 for where, _ in gone if where == p) for p in scores})
    neurons = sorted((float(v), p, i) for p, s in scores.items() if p[1] == "mlp" for i, v in enumerate(s))
    counts = {place: 0 for place in scores if place[1] == "mlp"}
    for _, place, unit in neurons:
        if left <= budget.allowed(20):
            break
        gone.add((place, unit))
        left -= structure.mlp.cost - (structure.mlp.added_bias if counts[place] == 0 else 0)
        counts[place] += 1
    require_equal(kind, pruned(kind, 20, structure="AL-MM", remove_heads=2), gone)


@pytest.mark.parametrize("kind", tiny.HEADS_GO)
@pytest.mark.parametrize("changes", [STRUCTURES[1], STRUCTURES[3]], ids=["UL-UM", "UL-MM"])
def test_every_block_loses_the_same(kind: str, changes: dict[str, Any]) -> None:
    shape = ModelShape(**tiny.shape(kind))
    model = pruned(kind, 50, **changes)
    family, widths = family_of(model), {}
    for layer in range(tiny.LAYERS):
        block = model.get_submodule(f"{family.blocks}.{layer}")
        widths[layer] = {linear.name: block.get_submodule(linear.path).out_features for linear in family.types}
    assert widths[0]["q"] == widths[1]["q"] == shape.heads // 2 * shape.head_dim
    first, second = (widths[layer].get("up", widths[layer].get("fc1", 0)) for layer in range(2))
    assert abs(first - second) <= 1
    scores = scores_by_loops(kind, "wifv", True)
    gone = {
        ((layer, "mlp"), int(unit))
        for layer, width in ((0, first), (1, second))
        for unit in np.argsort(scores[layer, "mlp"].numpy())[: tiny.INTERMEDIATE - width]
    }
    gone |= {
        ((layer, "attention"), int(unit))
        for layer in range(2)
        for unit in np.argsort(scores[layer, "attention"].numpy())[: shape.kv_heads // 2]
    }
    require_equal(kind, model, gone)


@settings(max_examples=40, deadline=None)
@given(
    kind=st.sampled_from(sorted(tiny.HEADS_GO)),
    ratio=st.integers(1, 80),
    changes=st.sampled_from(STRUCTURES),
    metric=st.sampled_from(["wifv", "ifv", "wifn"]),
)
def test_written_models_meet_the_budget(kind: str, ratio: int, changes: dict[str, Any], metric: str) -> None:
    shape = ModelShape(**tiny.shape(kind))
    structure = Structure.of(Budget.of(shape))
    allowed = structure.budget.allowed(ratio)
    heads = structure.attention.cost * changes.get("remove_heads", 0) // structure.heads_per_group
    if heads > structure.budget.dense_parameters - allowed:
        with pytest.raises(RankwiseError, match=f"alone removes more than {ratio} %"):
            pruned(kind, ratio, metric=metric, **changes)
        return
    if changes["structure"].endswith("MM"):
        ratio = min(ratio, 60)  # what so few heads and all neurons hold
        allowed = structure.budget.allowed(ratio)
    counts = count_parameters(pruned(kind, ratio, metric=metric, **changes), shape)
    assert allowed - structure.mlp.cost < counts["decoder_linears"] <= allowed


@pytest.mark.parametrize("kind", tiny.HEADS_GO)
def test_what_lost_nothing_stays_as_it_is(kind: str) -> None:
    """A tiny budget touches single neurons: attention has no entry, and no bias is added where nothing went."""
    model = pruned(kind, 1)
    recipe, biased = recipe_of(model), kind in ("opt", "llama-biased")
    assert recipe
    assert not any("self_attn" in name for name in recipe)
    for layer in range(tiny.LAYERS):
        block = f"{family_of(model).blocks}.{layer}"
        touched = [name for name in recipe if name.startswith(block)]
        reader = model.get_submodule(f"{block}.{'fc2' if kind == 'opt' else 'mlp.down_proj'}")
        assert (reader.bias is not None) == (bool(touched) or biased)
        assert (reader.in_features < tiny.INTERMEDIATE) == bool(touched)


@pytest.mark.parametrize("kind", tiny.HEADS_GO)
def test_a_pruned_model_reads_back_and_generates_with_its_cache(kind: str, tmp_path: Path) -> None:
    tiny.tokenizer().save_pretrained(tmp_path / "tokenizer")
    model = pruned(kind, 50, structure="UL-UM")
    assert any("self_attn" in name for name in recipe_of(model))
    save_checkpoint(model, tmp_path / "tokenizer", tmp_path / "pruned")
    again = load_checkpoint(tmp_path / "pruned", torch.float32)
    ids = some_tokens(2)
    assert torch.equal(again(ids).logits, model(ids).logits)
    cached, plain = (
        again.generate(ids, max_new_tokens=6, min_new_tokens=6, do_sample=False, use_cache=use) for use in (True, False)
    )
    assert cached.shape[1] == ids.shape[1] + 6
    assert torch.equal(cached, plain)


@pytest.mark.parametrize("kind", tiny.HEADS_GO)
def test_compensation_keeps_the_mean_of_the_outputs(kind: str) -> None:
    """Where nothing before it changed, a pruned layer gives on average what it gave."""
    pruned_model, dense = pruned(kind, 5), tiny.model(kind)
    name = f"{family_of(dense).blocks}.0.{'fc2' if kind == 'opt' else 'mlp.down_proj'}"
    averages = []
    for model in (dense, pruned_model):
        outputs: list[torch.Tensor] = []
        model.get_submodule(name).register_forward_hook(
            lambda module, args, out, to=outputs: to.append(out.double().flatten(0, -2).mean(dim=0))
        )
        model(some_tokens())
        averages += outputs
    assert not any("layers.0.self_attn" in entry for entry in recipe_of(pruned_model))
    assert pruned_model.get_submodule(name).in_features < tiny.INTERMEDIATE
    assert float(averages[0].abs().max()) > 0.01
    assert torch.allclose(averages[0], averages[1], atol=1e-5)


def test_channels_that_cannot_be_told_apart_name_their_layer(tmp_path: Path) -> None:
    def change(layer: int, site: str, moments: Moments) -> Moments:
        if (layer, site) != (1, "mlp_output"):
            return moments
        same = torch.ones_like(moments.window_means)
        return Moments(torch.zeros_like(moments.within), same, moments.absolute_mean, moments.window_length)

    with pytest.raises(RankwiseError, match=r"layers\.1\.mlp\.down_proj: its input channels all fluctuate alike"):
        pruned("llama", statistics=changed_statistics(tmp_path, change))


def test_what_cannot_be_met_is_said() -> None:
    for structure in ("AL-AM", "UL-UM"):
        with pytest.raises(RankwiseError, match="removing 89 % is out of reach: pruning 2 of 2 blocks"):
            pruned("llama", 89, structure=structure)
    with pytest.raises(RankwiseError, match="even all neurons that can go are too few"):
        pruned("opt", 70, structure="AL-MM", remove_heads=2)
    with pytest.raises(RankwiseError, match="each block loses 1 of 4 key/value heads"):
        pruned("opt", 70, structure="UL-MM", remove_heads=2)
    with pytest.raises(RankwiseError, match=r"`remove_heads: 3` must be a multiple of 2: query heads go together"):
        pruned("llama-gqa", structure="AL-MM", remove_heads=3)
    with pytest.raises(RankwiseError, match=r"multiple of 4: .* and from every block the same"):
        pruned("llama-gqa", structure="UL-MM", remove_heads=2)
    with pytest.raises(RankwiseError, match="`remove_heads: 6` alone removes more than 5 %"):
        pruned("llama", 5, structure="AL-MM", remove_heads=6)
    for wrong in ({"structure": "AL-MM"}, {"remove_heads": 2}):
        with pytest.raises(ValidationError, match="only by them"):
            Settings(**PRESET | wrong)
    budget = Budget.of(ModelShape(**tiny.shape("llama")))
    with pytest.raises(RankwiseError, match="has no statistics"):
        compress_model("flap", PRESET, {"model": tiny.model("llama"), "budget": budget, "ratio": 20, "seed": 0})
