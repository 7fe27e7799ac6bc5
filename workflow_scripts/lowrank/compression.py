"""From a method's preset to a checkpoint and the manifest that accounts for it."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel

from lowrank.bases import Bases
from lowrank.budget import Budget, Ranks, has_native_bias
from lowrank.checkpoint import replace_linears
from lowrank.config.presets import MethodSettings
from lowrank.config.sources import ModelShape
from lowrank.errors import RankwiseError
from lowrank.factors import LowRankFactors


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
    """

    settings: Any
    model: PreTrainedModel
    budget: Budget
    ratio: int
    seed: int
    bases: Bases | None = None
    allocation: Ranks | None = None

    def required_bases(self) -> Bases:
        """The bases; an error if the preset names no covariance."""
        if self.bases is None:
            raise RankwiseError(f"a preset of kind '{self.settings.kind}' needs `calibration` and `covariance`")
        return self.bases


def compress_model(kind: str, settings: dict[str, Any], task_without_settings: dict[str, Any]) -> Ranks:
    """Run a method and put its factors into the model, in place.

    Args:
        kind: the method's module name.
        settings: its preset as a plain dict.
        task_without_settings: the other fields of a `CompressionTask`.

    Returns:
        The rank of every linear layer, None where it stayed dense.
    """
    module = importlib.import_module(f"lowrank.methods.{kind.replace('-', '_')}")
    typed: MethodSettings = module.Settings.model_validate(settings)
    task = CompressionTask(settings=typed, **task_without_settings)
    factors: dict[str, LowRankFactors] = module.compress(task)
    replace_linears(task.model, factors)
    return {
        linear.name: factors[linear.name].rank if linear.name in factors else None for linear in task.budget.modules
    }


def count_parameters(model: PreTrainedModel, shape: ModelShape) -> dict[str, int]:
    """Parameters of a model as it stands, and of its dense original.

    `decoder_linears` counts weights of the linear layers and the biases that compression added, so that it
    compares with the weights of the dense layers, as the paper's budget does.
    """
    budget = Budget.of(shape)
    kept, added = 0, 0
    for linear in budget.modules:
        total = sum(parameter.numel() for parameter in model.get_submodule(linear.name).parameters())
        native = linear.out_features if has_native_bias(shape, linear) else 0
        kept += total - native
        added += total - native - linear.parameters
    unique = {id(parameter): parameter.numel() for parameter in model.parameters()}
    total = sum(unique.values())
    return {
        "total": total,
        "total_dense": total - added,
        "decoder_linears": kept,
        "decoder_linears_dense": budget.dense_parameters,
    }
