"""Attention with fewer dimensions a head, against dense models in which the dimensions that went are masked."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from lowrank.config.sources import ModelShape
from lowrank.evaluation.cost import count_macs
from lowrank.model.checkpoint import family_of, load_checkpoint, recipe_of, replace_modules, save_checkpoint
from lowrank.model.parameters import count_parameters, linear_sizes
from lowrank.model.replacements import NarrowedHeads, Replacement, SmallerLinear
from tests import tiny
from tests.unit.model.test_checkpoint import open_outside

IDS = torch.randint(2, 400, (2, 14), generator=torch.Generator().manual_seed(6))
KINDS = tiny.PAIRS_GO
NORMED = ("qwen3", "olmo2", "gemma3_text")
PAIRS, VALUES = 5, 11  # of 8 pairs and 16 dimensions


def rows_of(kept: list[list[int]], heads: int) -> list[int]:
    """Rows of a matrix of `heads` heads of which each keeps the dimensions of its group."""
    per_group = heads // len(kept)
    return [head * tiny.HEAD_DIM + row for head in range(heads) for row in kept[head // per_group]]


def drawn(kind: str, seed: int) -> tuple[torch.Tensor, list[list[int]], list[list[int]]]:
    """Units of q and k that stay in each group, the dimensions that these are, and those of v that stay."""
    generator, groups = torch.Generator().manual_seed(seed), tiny.SHAPES[kind]["kv_heads"]
    half = tiny.HEAD_DIM // 2
    units = torch.stack([torch.randperm(half, generator=generator)[:PAIRS].sort().values for _ in range(groups)])
    values = [torch.randperm(tiny.HEAD_DIM, generator=generator)[:VALUES].tolist() for _ in range(groups)]
    dimensions = [[*each, *(unit + half for unit in each)] for each in units.tolist()]
    return units, dimensions, values


def layers_of(model: PreTrainedModel, layer: int) -> dict[str, tuple[str, torch.nn.Linear]]:
    family = family_of(model)
    names = {linear.name: f"{family.blocks}.{layer}.{linear.path}" for linear in family.types}
    return {short: (name, model.get_submodule(name)) for short, name in names.items()}


def cuts_of(kind: str, layer: int, queries: bool, values: bool) -> Iterator[tuple[str, torch.nn.Linear, list[int]]]:
    """(name, layer, rows that stay) of q, k and v of a block."""
    shape, layers = tiny.SHAPES[kind], layers_of(tiny.model(kind), layer)
    _, dimensions, inner = drawn(kind, seed=layer)
    if queries:
        yield (*layers["q"], rows_of(dimensions, shape["heads"]))
        yield (*layers["k"], rows_of(dimensions, shape["kv_heads"]))
    if values:
        yield (*layers["v"], rows_of(inner, shape["kv_heads"]))


def narrowed(kind: str, queries: bool = True, values: bool = True, blocks: tuple[int, ...] = (0, 1)) -> PreTrainedModel:
    model, shape = tiny.model(kind), tiny.SHAPES[kind]
    changes: dict[str, Replacement] = {}
    for layer in blocks:
        units, _, inner = drawn(kind, seed=layer)
        layers = layers_of(model, layer)
        for name, linear, rows in cuts_of(kind, layer, queries, values):
            bias = None if linear.bias is None else linear.bias.detach()[rows]
            changes[name] = SmallerLinear(linear.weight.detach()[rows], bias)
        if values:
            name, linear = layers["o"]
            changes[name] = SmallerLinear(linear.weight.detach()[:, rows_of(inner, shape["heads"])], linear.bias)
        pairs = units if queries and kind != "opt" else None
        changes[layers["q"][0].rpartition(".")[0]] = NarrowedHeads(shape["heads"], shape["kv_heads"], pairs)
    replace_modules(model, changes)
    return model


def masked(kind: str, queries: bool = True, values: bool = True, blocks: tuple[int, ...] = (0, 1)) -> PreTrainedModel:
    """The dense model, with zeros for q, k and v in the dimensions that went."""
    model = tiny.model(kind)
    for layer in blocks:
        for name, _, rows in cuts_of(kind, layer, queries, values):
            linear = model.get_submodule(name)
            gone = sorted(set(range(linear.out_features)) - set(rows))
            linear.weight.data[gone] = 0
            if linear.bias is not None:
                linear.bias.data[gone] = 0
    return model


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("queries", "values"), [(True, False), (False, True), (True, True)])
def test_dimensions_that_went_are_as_good_as_zeros(kind: str, queries: bool, values: bool) -> None:
    found, expected = narrowed(kind, queries, values)(IDS).logits, masked(kind, queries, values)(IDS).logits
    assert not torch.allclose(expected, tiny.model(kind)(IDS).logits, atol=1e-2)
    assert torch.allclose(found, expected, atol=1e-4)


@pytest.mark.parametrize("kind", NORMED)
def test_norms_of_whole_heads_leave_v_and_o_alone(kind: str) -> None:
    assert torch.allclose(narrowed(kind, False)(IDS).logits, masked(kind, False)(IDS).logits, atol=1e-4)
    with pytest.raises(ValueError, match="rotary pairs cannot go where q and k are normed"):
        narrowed(kind)


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_removed_changes_nothing(kind: str) -> None:
    model, shape = tiny.model(kind), tiny.SHAPES[kind]
    half = tiny.HEAD_DIM // 2
    pairs = None if kind == "opt" else torch.arange(half).repeat(shape["kv_heads"], 1)
    name = layers_of(model, 0)["q"][0].rpartition(".")[0]
    replace_modules(model, {name: NarrowedHeads(shape["heads"], shape["kv_heads"], pairs)})
    assert torch.allclose(model(IDS).logits, tiny.model(kind)(IDS).logits, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_implementations_of_attention_agree(kind: str) -> None:
    model = narrowed(kind)
    found = {}
    for implementation in ("sdpa", "eager"):
        model.set_attn_implementation(implementation)
        found[implementation] = model(IDS).logits
    assert torch.allclose(found["sdpa"], found["eager"], atol=1e-5)
    weights = model(IDS, output_attentions=True).attentions
    assert [tuple(each.shape) for each in weights] == [(2, 4, 14, 14)] * tiny.LAYERS


@pytest.mark.parametrize("kind", KINDS)
def test_a_padded_batch_is_masked(kind: str) -> None:
    model = narrowed(kind)
    padded = torch.cat([torch.full((2, 3), 1), IDS], dim=1)
    mask = torch.cat([torch.zeros(2, 3), torch.ones(2, 14)], dim=1).long()
    for implementation in ("sdpa", "eager"):
        model.set_attn_implementation(implementation)
        found = model(padded, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0)).logits[:, 3:]
        assert torch.allclose(found, model(IDS).logits, atol=1e-4)


@pytest.mark.parametrize("kind", tiny.FEW)
@pytest.mark.parametrize("blocks", [(0,), (0, 1)])
def test_generation_with_a_cache_is_that_without(kind: str, blocks: tuple[int, ...]) -> None:
    model = narrowed(kind, kind in KINDS, True, blocks)
    options = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
    plain = model.generate(IDS, use_cache=False, **options)
    assert torch.equal(model.generate(IDS, use_cache=True, **options), plain)
    assert torch.equal(model.generate(IDS, cache_implementation="static", **options), plain)
    cache = model(IDS, use_cache=True).past_key_values
    narrow = 2 * PAIRS if kind in KINDS else tiny.HEAD_DIM
    assert (cache.layers[0].keys.shape[-1], cache.layers[0].values.shape[-1]) == (narrow, VALUES)


@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_reads_back_bit_for_bit(kind: str, tmp_path: Path) -> None:
    tiny.tokenizer().save_pretrained(tmp_path / "tokenizer")
    model = narrowed(kind)
    save_checkpoint(model, tmp_path / "tokenizer", tmp_path / "narrow")
    again = load_checkpoint(tmp_path / "narrow", torch.float32)
    assert torch.equal(again(IDS).logits, model(IDS).logits)
    entry = recipe_of(again)[layers_of(model, 0)["q"][0].rpartition(".")[0]]
    shape = tiny.SHAPES[kind]
    assert entry == {
        "kind": "narrow_heads",
        "heads": shape["heads"],
        "kv_heads": shape["kv_heads"],
        "pairs": None if kind == "opt" else PAIRS,
    }
    half = load_checkpoint(tmp_path / "narrow", torch.bfloat16)
    assert torch.allclose(half(IDS).logits.float(), model(IDS).logits, atol=0.3)
    if kind != "opt":
        assert half.model.layers[0].self_attn.pairs.dtype == torch.int32


def test_checkpoints_open_outside_the_repository(tmp_path: Path) -> None:
    models = {kind: narrowed(kind) for kind in ("llama-gqa", "opt")}
    assert open_outside(tmp_path, models, IDS) == dict.fromkeys(models, 3)


@pytest.mark.parametrize("kind", KINDS)
def test_one_graph(kind: str) -> None:
    model = narrowed(kind)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    assert torch.allclose(compiled(IDS, use_cache=False).logits, model(IDS).logits, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_parameters_and_products_are_counted(kind: str) -> None:
    """By hand: h and g heads of two widths, d = 64; an index a pair and key head, if there are pairs."""
    shape, described = tiny.SHAPES[kind], ModelShape(**tiny.shape(kind))
    heads, groups, d = shape["heads"], shape["kv_heads"], tiny.HIDDEN
    model = narrowed(kind)
    went = (heads + groups) * d * (2 * tiny.HEAD_DIM - 2 * PAIRS - VALUES)
    indices = 0 if kind == "opt" else groups * PAIRS
    found, before = (count_parameters(each, described)["decoder_linears"] for each in (model, tiny.model(kind)))
    assert before - found == tiny.LAYERS * (went - indices)
    widths = [linear_sizes(model, described)[layers_of(model, 0)[name][0]] for name in "qkv"]
    assert [each["out_features"] for each in widths] == [heads * 2 * PAIRS, groups * 2 * PAIRS, groups * VALUES]
    found, before = (count_macs(each, described, 7) for each in (model, tiny.model(kind)))
    assert before["linears"] - found["linears"] == tiny.LAYERS * 7 * went
    assert found["attention"] == tiny.LAYERS * 7**2 * heads * (2 * PAIRS + VALUES)
