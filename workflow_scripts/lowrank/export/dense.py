"""A checkpoint of the base architecture: what `AutoModelForCausalLM` opens with transformers' own classes."""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import save_torch_state_dict
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedModel

from lowrank.compression.branches import Structure
from lowrank.errors import RankwiseError
from lowrank.export.blocks import Block, Plain, base_shape, blocks_of, padded, plain_layer, structure_of
from lowrank.model.checkpoint import as_stored, stored_name
from lowrank.model.families import BIAS_OPTIONS, FAMILIES, family_for, has_native_bias, linear_modules
from lowrank.model.modeling_rankwise import separate_projections
from lowrank.model.older_names import older_names

OWN_HEAD_DIM = ("llama", "mistral", "qwen3", "gemma3_text")
"""Families whose configuration states the width of a head, so that there may be fewer of them."""


@dataclass(frozen=True)
class Stock:
    """A model of the base architecture.

    Attributes:
        config: as `config.json` has it.
        state: all its tensors, tied ones once.
        zeros: how many of its numbers are zero because the architecture has no place without them.
    """

    config: dict[str, Any]
    state: dict[str, torch.Tensor]
    zeros: int

    @property
    def parameters(self) -> int:
        """Numbers in it, zeros included."""
        return sum(tensor.numel() for tensor in self.state.values())


def stock_model(model: PreTrainedModel) -> Stock:
    """Multiply a model out, and find the smallest shape of its base architecture that holds it.

    The MLPs of all blocks get the width of the widest, attention the heads of the block that has most.

    Raises:
        RankwiseError: the architecture has no place for what compression added; it says what and where.
    """
    if base_shape(model).experts:
        return _stock_mixture(model)
    structure, blocks = structure_of(model), blocks_of(model)
    family = FAMILIES[structure.budget.dimensions.family]
    numbers, biased = _switches(structure, blocks)
    neurons, groups = max(block.neurons for block in blocks), _groups(structure, blocks)
    numbers["ffn_dim" if family.model_type == "opt" else "intermediate_size"] = neurons
    if groups != structure.attention.units:
        numbers |= {"num_attention_heads": groups * structure.heads_per_group, "num_key_value_heads": groups}
    linears: dict[str, torch.Tensor] = {}
    for layer, block in enumerate(blocks):
        whole = padded(block, structure, neurons, groups)
        for linear in family.types:
            name = structure.layer_name(layer, linear)
            linears |= _tensors(name, whole.layers[linear.name], linear.name in biased)
    modules = {module.name: model.get_submodule(module.name) for module in structure.budget.modules}
    zeros = sum(tensor.numel() for tensor in linears.values()) - sum(map(_numbers_of, modules.values()))
    state = as_stored(_others(model, modules) | linears, family)
    stock = Stock(_config(model, family.model_type, numbers), state, zeros)
    _require_fit(stock)
    return stock


def _stock_mixture(model: PreTrainedModel) -> Stock:
    """The same of a model with experts, of which no method prunes anything: all matrices have their full widths.

    Raises:
        RankwiseError: a layer has a bias, and the architecture none for it.
    """
    shape = base_shape(model)
    family, found = family_for(shape), list(linear_modules(shape))
    modules = {module.name: model.get_submodule(module.name) for module in found}
    linears: dict[str, torch.Tensor] = {}
    for module in found:
        plain = plain_layer(modules[module.name], model.dtype)
        if plain.bias is not None and not has_native_bias(shape, module):
            raise RankwiseError(_no_place(module.name, family.model_type))
        linears |= _tensors(module.name, plain, plain.bias is not None)
    state = as_stored(_others(model, modules) | linears, family)
    stock = Stock(_config(model, family.model_type, {}), state, 0)
    _require_fit(stock)
    return stock


def write_stock(stock: Stock, folder: Path) -> None:
    """Write `config.json` and the weights into an existing folder."""
    save_torch_state_dict(stock.state, folder)
    text = json.dumps(stock.config, indent=2, sort_keys=True) + "\n"
    (folder / "config.json").write_text(text, encoding="utf-8")


def _switches(structure: Structure, blocks: list[Block]) -> tuple[dict[str, Any], set[str]]:
    """Keys of the configuration to set, and all types that have a bias with them.

    Raises:
        RankwiseError: a layer has a bias, and the architecture none for it.
    """
    family = FAMILIES[structure.budget.dimensions.family]
    biased, numbers = set(family.biased), {}
    for key in family.bias_options:
        types = BIAS_OPTIONS[key]
        if any(block.layers[name].bias is not None for block in blocks for name in types):
            numbers[key] = True
            biased |= set(types)
    for layer, block in enumerate(blocks):
        for linear in family.types:
            if block.layers[linear.name].bias is not None and linear.name not in biased:
                raise RankwiseError(_no_place(structure.layer_name(layer, linear), family.model_type))
    return numbers, biased


def _no_place(name: str, family: str) -> str:
    return (
        f"{name}: compression gave it a bias, and transformers' `{family}` has no place for one. Compress without new "
        "biases (`estimator: uncentred` in the preset of covariance), or use the checkpoint as it is."
    )


def _groups(structure: Structure, blocks: list[Block]) -> int:
    """Key/value heads of all blocks: the fewest that hold them, and that the configuration can state."""
    shape, most = structure.budget.dimensions, max(block.groups for block in blocks)
    if shape.family not in OWN_HEAD_DIM:
        return shape.kv_heads
    fitting = [
        count for count in range(most, shape.kv_heads) if shape.hidden % (count * structure.heads_per_group) == 0
    ]
    return min([*fitting, shape.kv_heads])


def _tensors(name: str, plain: Plain, biased: bool) -> dict[str, torch.Tensor]:
    tensors = {f"{name}.weight": plain.weight.contiguous()}
    if biased:
        tensors[f"{name}.bias"] = plain.weight.new_zeros(len(plain.weight)) if plain.bias is None else plain.bias
    return tensors


def _numbers_of(layer: Any) -> int:
    """Numbers of a layer multiplied out at its own widths."""
    has_bias = (layer.up.bias if hasattr(layer, "up") else layer.bias) is not None
    return int(layer.out_features * (layer.in_features + has_bias))


def _others(model: PreTrainedModel, linears: dict[str, Any]) -> dict[str, torch.Tensor]:
    """All tensors that do not belong to linear layers of blocks; a tied head is left out, as checkpoints leave it."""
    prefixes = tuple(f"{name}." for name in linears)
    skipped = {"lm_head.weight"} if model.config.tie_word_embeddings else set()
    return {
        name: tensor.detach()
        for name, tensor in model.state_dict().items()
        if not name.startswith(prefixes) and name not in skipped and not name.endswith(".self_attn.pairs")
    }


def _config(model: PreTrainedModel, family: str, numbers: dict[str, Any]) -> dict[str, Any]:
    """The configuration of the base architecture, with other numbers."""
    own = ("recipe", "auto_map", "model_type", "architectures", "_name_or_path")
    kept = {key: value for key, value in model.config.to_dict().items() if key not in own}
    config = CONFIG_MAPPING[family](**(kept | numbers))
    with torch.device("meta"):
        config.architectures = [type(AutoModelForCausalLM.from_config(config)).__name__]
    config.dtype = model.dtype
    found: dict[str, Any] = json.loads(config.to_json_string(use_diff=False))
    return found | older_names(found)


def _require_fit(stock: Stock) -> None:
    """See that the architecture has these tensors and no others, in these shapes.

    Raises:
        RankwiseError: it has not; a tensor is named.
    """
    config = CONFIG_MAPPING[stock.config["model_type"]](**copy.deepcopy(stock.config))  # which it fills in
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    family = FAMILIES[config.model_type]
    if family.experts:  # which files hold one by one
        separate_projections(model)
    expected = {stored_name(name, family): tensor.shape for name, tensor in model.state_dict().items()}
    if config.tie_word_embeddings:
        del expected["lm_head.weight"]
    found = {name: tensor.shape for name, tensor in stock.state.items()}
    if wrong := sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name)):
        name = wrong[0]
        raise RankwiseError(
            f"{name}: {found.get(name, 'missing')} here, {expected.get(name, 'unknown')} in transformers' "
            f"`{stock.config['model_type']}`; this checkpoint cannot be written as one."
        )
