"""From a method's preset to a checkpoint and the manifest that accounts for it."""

from __future__ import annotations

import copy
import importlib
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from lowrank.bases.principal import Bases
from lowrank.calibration.statistics import Statistics
from lowrank.config.low_rank import LowRankSettings
from lowrank.config.presets import MethodSettings
from lowrank.config.sources import ModelShape
from lowrank.errors import RankwiseError
from lowrank.model.checkpoint import replace_modules
from lowrank.model.factors import LowRankFactors
from lowrank.model.modeling_rankwise import LowRankLinear, Shortcuts
from lowrank.model.replacements import IdentityBlockFactors, Replacements
from lowrank.model.runtime import pick_device
from lowrank.ranks.budget import Budget, Ranks, has_native_bias


@dataclass(frozen=True)
class CompressionTask:
    """What a method is given.

    Attributes:
        settings: its preset, an instance of its own `Settings`.
        model: the dense model; not to be changed.
        budget: its linear layers and their accounting.
        ratio: percent of the linear layers' parameters to remove.
        seed: for whatever is random in the method.
        bases: principal bases, if the preset names a covariance.
        allocation: ranks, if the preset names a search.
        statistics: moments of the layers' inputs, if the method reads them.
        tokens: calibration windows, n x length, if the method reads them.
    """

    settings: Any
    model: PreTrainedModel
    budget: Budget
    ratio: int
    seed: int
    bases: Bases | None = None
    allocation: Ranks | None = None
    statistics: Statistics | None = None
    tokens: torch.Tensor | None = None

    def required_bases(self) -> Bases:
        """The bases; an error if the preset names no covariance."""
        if self.bases is None:
            raise RankwiseError(f"a preset of kind '{self.settings.kind}' needs `calibration` and `covariance`")
        return self.bases

    def required_statistics(self) -> Statistics:
        """The moments of the layers' inputs; an error if the method does not declare that it reads them."""
        if self.statistics is None:
            raise RankwiseError(f"method '{self.settings.kind}' has no statistics: its `reads` must name them")
        return self.statistics

    def required_tokens(self) -> torch.Tensor:
        """The calibration windows; an error if the method does not declare that it reads them."""
        if self.tokens is None:
            raise RankwiseError(f"method '{self.settings.kind}' has no calibration windows: its `reads` must name them")
        return self.tokens


def compress_model(kind: str, settings: dict[str, Any], task_without_settings: dict[str, Any]) -> Ranks:
    """Run a method and put what it returns into the model, in place.

    Args:
        kind: the method's module name.
        settings: its preset as a plain dict.
        task_without_settings: the other fields of a `CompressionTask`.

    Returns:
        The rank of every linear layer, None where it is no low-rank pair.
    """
    module = importlib.import_module(f"lowrank.methods.{kind.replace('-', '_')}")
    typed: MethodSettings = module.Settings.model_validate(settings)
    task = CompressionTask(settings=typed, **task_without_settings)
    identity_block = isinstance(typed, LowRankSettings) and typed.identity_block
    task = replace(task, budget=replace(task.budget, identity_block=identity_block))
    replacements: Replacements = module.compress(task)
    if identity_block:
        replacements = with_identity_blocks(replacements)
    replace_modules(task.model, replacements)
    pairs = LowRankFactors | IdentityBlockFactors
    factors = {name: changed for name, changed in replacements.items() if isinstance(changed, pairs)}
    return {
        linear.name: factors[linear.name].rank if linear.name in factors else None for linear in task.budget.modules
    }


def with_identity_blocks(replacements: Replacements) -> Replacements:
    """The same maps, with an identity block in every pair.

    Raises:
        RankwiseError: a pair has not its full rank; the layer is named.
    """
    changed, device = dict(replacements), pick_device()
    for name, pair in replacements.items():
        if isinstance(pair, LowRankFactors):
            changed[name] = IdentityBlockFactors.of(pair, name, device)
    return changed


def count_parameters(model: PreTrainedModel, shape: ModelShape) -> dict[str, int]:
    """Parameters of a model as it stands, and of its dense original.

    `decoder_linears` counts the weights of the linear layers, the biases and indices that compression added, and the
    shortcuts of residual connections: it compares with the weights of the dense layers, as the paper's budget does.
    """
    budget = Budget.of(shape)
    kept, indices = shortcut_parameters(model), 0
    for linear in budget.modules:
        layer = model.get_submodule(linear.name)
        kept += sum(parameter.numel() for parameter in layer.parameters())
        kept -= _bias_size(layer) if has_native_bias(shape, linear) else 0
        indices += sum(index.numel() for index in layer.buffers())
    unique = {id(parameter): parameter.numel() for parameter in model.parameters()}
    return {
        "total": sum(unique.values()) + indices,
        "total_dense": dense_total(model),
        "decoder_linears": kept + indices,
        "decoder_linears_dense": budget.dense_parameters,
    }


def shortcut_parameters(model: PreTrainedModel) -> int:
    """Weights of the matrices in residual connections."""
    blocks = [block for block in model.modules() if isinstance(block, Shortcuts)]
    return sum(block.attention_shortcut.weight.numel() + block.mlp_shortcut.weight.numel() for block in blocks)


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
