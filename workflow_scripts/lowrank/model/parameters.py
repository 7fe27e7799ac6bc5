"""How many parameters a model has as it stands, and its dense original."""

from __future__ import annotations

import copy

import torch
from torch import nn
from transformers import PreTrainedModel

from lowrank.model.families import Dimensions, has_native_bias, linear_modules
from lowrank.model.modeling_rankwise import LowRankLinear, NarrowHeads, Shortcuts, features_of


def count_parameters(model: PreTrainedModel, shape: Dimensions) -> dict[str, int]:
    """Parameters of a model as it stands, and of its dense original.

    `decoder_linears` counts the weights of the linear layers, the biases and indices that compression added, and the
    shortcuts of residual connections: it compares with the weights of the dense layers, as the paper's budget does.
    """
    indices = pair_indices(model)
    for linear in linear_modules(shape):
        indices += sum(index.numel() for index in model.get_submodule(linear.name).buffers())
    unique = {id(parameter): parameter.numel() for parameter in model.parameters()}
    by_layer = sum(layer["parameters"] for layer in linear_sizes(model, shape).values())
    return {
        "total": sum(unique.values()) + indices,
        "total_dense": dense_total(model),
        "decoder_linears": by_layer + shortcut_parameters(model) + pair_indices(model),
        "decoder_linears_dense": sum(linear.parameters for linear in linear_modules(shape)),
    }


def linear_sizes(model: PreTrainedModel, shape: Dimensions) -> dict[str, dict[str, int]]:
    """What is left of every linear layer of the decoder.

    Returns:
        Module -> its `out_features` and `in_features`, and its `parameters`: weights, with the biases and indices that
        compression added.
    """
    sizes = {}
    for linear in linear_modules(shape):
        layer = model.get_submodule(linear.name)
        parameters = sum(parameter.numel() for parameter in layer.parameters())
        parameters -= _bias_size(layer) if has_native_bias(shape, linear) else 0
        parameters += sum(index.numel() for index in layer.buffers())
        sizes[linear.name] = {**features_of(layer), "parameters": parameters}
    return sizes


def shortcut_parameters(model: PreTrainedModel) -> int:
    """Weights of the matrices in residual connections."""
    blocks = [block for block in model.modules() if isinstance(block, Shortcuts)]
    return sum(block.attention_shortcut.weight.numel() + block.mlp_shortcut.weight.numel() for block in blocks)


def pair_indices(model: PreTrainedModel) -> int:
    """Indices of the rotary pairs that attention modules have left, where they have not all."""
    modules = [module for module in model.modules() if isinstance(module, NarrowHeads)]
    return sum(0 if module.pairs is None else module.pairs.numel() for module in modules)


def dense_total(model: PreTrainedModel) -> int:
    """Parameters of the dense model of the same configuration, tied ones once; it is built without memory."""
    config = copy.deepcopy(model.config)
    if hasattr(config, "recipe"):
        config.recipe = None
    with torch.device("meta"):
        dense = type(model)(config)
        dense.tie_weights()
    unique = {id(parameter): parameter.numel() for parameter in dense.parameters()}
    return sum(unique.values())


def _bias_size(layer: nn.Module) -> int:
    """Elements of the output bias of a layer, dense or low-rank."""
    bias = layer.up.bias if isinstance(layer, LowRankLinear) else layer.bias
    return int(bias.numel()) if isinstance(bias, torch.Tensor) else 0
