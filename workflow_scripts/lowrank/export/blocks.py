"""The blocks of a compressed model as plain matrices, at the widths that they have.

Pairs and identity blocks are multiplied out in float32. Heads that lost dimensions get them back as zeros, since all
formats know one width of a head; lost heads and neurons stay lost, and `padded` brings them back as zeros too. Zeros
change nothing: a neuron whose rows are zero is zero (`act(0) = 0` in all families), a dimension of a head that is zero
adds nothing to a product, and the columns that read them are zero.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from lowrank.compression.branches import Structure
from lowrank.compression.structured import channels
from lowrank.config.sources import ModelShape
from lowrank.errors import RankwiseError
from lowrank.model.checkpoint import MODEL_TYPE_PREFIX, recipe_of
from lowrank.model.modeling_rankwise import IdentityBlockLinear, LowRankLinear, NarrowHeads
from lowrank.model.shapes import shape_numbers
from lowrank.ranks.budget import Budget


@dataclass(frozen=True)
class Plain:
    """A dense layer.

    Attributes:
        weight: m x n.
        bias: m, or None.
    """

    weight: torch.Tensor
    bias: torch.Tensor | None


@dataclass(frozen=True)
class Block:
    """The linear layers of a block.

    Attributes:
        layers: by type (`q`, `gate`, ...).
        neurons: of its MLP.
        groups: key/value heads.
    """

    layers: Mapping[str, Plain]
    neurons: int
    groups: int


def base_shape(model: PreTrainedModel) -> ModelShape:
    """The shape of the dense model that a checkpoint was made from."""
    config = model.config.to_dict()
    config["model_type"] = str(model.config.model_type).removeprefix(MODEL_TYPE_PREFIX)
    return ModelShape(**shape_numbers(config))


def structure_of(model: PreTrainedModel) -> Structure:
    """The branches of the dense model's blocks."""
    return Structure.of(Budget.of(base_shape(model)))


def blocks_of(model: PreTrainedModel) -> list[Block]:
    """Multiply all blocks of a model out.

    Raises:
        RankwiseError: its residual stream has a basis of its own, which no matrices in the layers can make up for.
    """
    if sliced := [name for name, entry in recipe_of(model).items() if entry["kind"] in ("shortcuts", "rms_norm")]:
        raise RankwiseError(
            f"{sliced[0]}: the residual stream is cut to a basis that changes from block to block (SliceGPT), and "
            "every other tool adds a block's result to its input. Such a checkpoint runs with its own code alone."
        )
    structure = structure_of(model)
    return [_block(model, structure, layer) for layer in range(structure.budget.dimensions.layers)]


def padded(block: Block, structure: Structure, neurons: int, groups: int) -> Block:
    """The same block with more neurons and key/value heads (and the query heads that share them), all zero.

    Args:
        block: as `blocks_of` has it.
        structure: of the dense model.
        neurons: no fewer than it has.
        groups: likewise.
    """
    layers = dict(block.layers)
    for branch, units in ((structure.mlp, neurons), (structure.attention, groups)):
        for linear in branch.writers:
            layers[linear.name] = _with_rows(layers[linear.name], units * branch.widths[linear.output])
        reader = layers[branch.reader.name]
        missing = units * branch.reader_width - reader.weight.shape[1]
        layers[branch.reader.name] = Plain(nn.functional.pad(reader.weight, (0, missing)), reader.bias)
    return Block(layers, neurons, groups)


def _with_rows(layer: Plain, rows: int) -> Plain:
    missing = rows - len(layer.weight)
    bias = None if layer.bias is None else nn.functional.pad(layer.bias, (0, missing))
    return Plain(nn.functional.pad(layer.weight, (0, 0, 0, missing)), bias)


def _block(model: PreTrainedModel, structure: Structure, layer: int) -> Block:
    types = structure.budget.modules
    layers = {
        module.type.name: plain_layer(model.get_submodule(module.name), model.dtype)
        for module in types
        if module.layer == layer
    }
    attention = model.get_submodule(structure.layer_name(layer, structure.attention.reader).rpartition(".")[0])
    groups = attention.kept_heads[1] if hasattr(attention, "kept_heads") else structure.attention.units
    if isinstance(attention, NarrowHeads):
        layers |= _whole_heads(layers, structure, groups, attention.pairs)
    return Block(layers, layers[structure.mlp.reader.name].weight.shape[1], groups)


def plain_layer(layer: Any, dtype: torch.dtype) -> Plain:
    """One matrix of a layer, in the model's dtype; products are of float32."""
    bias: torch.Tensor | None
    if isinstance(layer, LowRankLinear):
        # Whatever kind of module the first factor is, and whose: it is what it makes of the unit vectors.
        units = torch.eye(layer.in_features, device=layer.up.weight.device)
        weight, bias = layer.up.weight.float() @ copy.deepcopy(layer.down).float()(units).T, layer.up.bias
    elif isinstance(layer, IdentityBlockLinear):
        first = layer.down.weight.float()
        weight, bias = torch.cat([first, layer.rest.weight.float() @ first])[layer.places()], layer.bias
    else:
        weight, bias = layer.weight, layer.bias
    return Plain(weight.detach().to(dtype), None if bias is None else bias.detach())


def _whole_heads(
    layers: Mapping[str, Plain], structure: Structure, groups: int, pairs: torch.Tensor | None
) -> dict[str, Plain]:
    """Heads of their full width: what is left at its place, zeros elsewhere.

    Where rotary pairs went, dimension i and i + head_dim / 2 of a head are those of pair i, which is rotated by its own
    angle; so they go back to their places. All other dimensions of a head are alike, and come first.
    """
    full, shape = structure.budget.dimensions.head_dim, structure.budget.dimensions
    heads = {"q": groups * structure.heads_per_group, "k": groups, "v": groups}
    wide: dict[str, Plain] = {}
    for name, count in heads.items():
        width = len(layers[name].weight) // count
        within = torch.arange(width).repeat(groups, 1)
        if pairs is not None and name != "v":
            within = torch.cat([pairs.cpu().long(), pairs.cpu().long() + full // 2], dim=1)
        offsets = torch.arange(count) * full
        places = (offsets[:, None] + within.repeat_interleave(count // groups, dim=0)).flatten()
        wide[name] = _spread(layers[name], places, count * full)
    o = layers[structure.attention.reader.name]
    width = o.weight.shape[1] // heads["q"]
    columns = channels(torch.arange(heads["q"]), full).view(heads["q"], full)[:, :width].flatten()
    weight = o.weight.new_zeros(shape.hidden, heads["q"] * full)
    weight[:, columns] = o.weight
    return wide | {structure.attention.reader.name: Plain(weight, o.bias)}


def _spread(layer: Plain, rows: torch.Tensor, count: int) -> Plain:
    """A layer's outputs at given places among `count`."""
    weight = layer.weight.new_zeros(count, layer.weight.shape[1])
    weight[rows] = layer.weight
    if layer.bias is None:
        return Plain(weight, None)
    bias = layer.bias.new_zeros(count)
    bias[rows] = layer.bias
    return Plain(weight, bias)
