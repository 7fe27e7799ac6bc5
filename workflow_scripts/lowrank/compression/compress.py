"""From a method's preset to a checkpoint and the manifest that accounts for it."""

from __future__ import annotations

import importlib
import logging
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from transformers import PreTrainedModel

from lowrank.bases.principal import Bases
from lowrank.calibration.output_gradients import OutputGradients
from lowrank.calibration.routing import experts_left_dense, with_dense
from lowrank.calibration.statistics import Statistics
from lowrank.compression.eliminate_neurons import Eliminations
from lowrank.config.low_rank import LowRankSettings
from lowrank.config.presets import Covariance, MethodSettings
from lowrank.errors import RankwiseError
from lowrank.files import layer_files
from lowrank.jobs.state import Parts
from lowrank.model.checkpoint import replace_modules
from lowrank.model.factors import LowRankFactors
from lowrank.model.replacements import Deferred, IdentityBlockFactors, Replacement, Replacements
from lowrank.model.runtime import pick_device
from lowrank.ranks.budget import Budget, Ranks

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class CompressionTask:
    """What a method is given.

    Attributes:
        settings: its preset, an instance of its own `Settings`.
        model: the dense model; not to be changed.
        budget: its linear layers and their accounting; of a method of low-rank pairs, in the form of its pairs.
        ratio: percent of the linear layers' parameters to remove.
        seed: for whatever is random in the method.
        bases: principal bases, if the preset names a covariance.
        allocation: ranks, if the preset names a search.
        covariance: the preset of the bases, if the method reads statistics or gradients beside them.
        statistics: moments of the layers' inputs, if the method reads them.
        gradients: second moments of the loss gradients at the layers' outputs, if the method reads them.
        eliminations: what removing neurons is predicted to cost, if the method removes any by that.
        tokens: calibration windows, n x length, if the method reads them.
        account: what the method says of its result besides; the manifest has it.
        parts: where a method that takes long keeps what another try need not do again; None: nowhere.
    """

    settings: Any
    model: PreTrainedModel
    budget: Budget
    ratio: int
    seed: int
    bases: Bases | None = None
    allocation: Ranks | None = None
    covariance: Covariance | None = None
    statistics: Statistics | None = None
    gradients: OutputGradients | None = None
    eliminations: Eliminations | None = None
    tokens: torch.Tensor | None = None
    account: dict[str, Any] = field(default_factory=dict)
    parts: Parts | None = None

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

    def required_gradients(self) -> OutputGradients:
        """Second moments of the loss gradients; an error if the preset does not say that it reads them."""
        if self.gradients is None:
            raise RankwiseError(f"method '{self.settings.kind}' has no gradients: its `needs` must name them")
        return self.gradients

    def required_eliminations(self) -> Eliminations:
        """What removing neurons costs; an error if the preset does not say that it reads this."""
        if self.eliminations is None:
            raise RankwiseError(f"method '{self.settings.kind}' has no eliminations: its `eliminates` must name them")
        return self.eliminations

    def required_covariance(self) -> Covariance:
        """The preset of the bases; an error if there is none, or the method reads nothing that it would say how to."""
        if self.covariance is None:
            raise RankwiseError(f"method '{self.settings.kind}' has no preset of `covariance` for what it reads itself")
        return self.covariance

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
    if why := typed.why_not_experts(task.budget.dimensions):
        raise RankwiseError(f"{kind}: {why}")
    task = _with_dense_experts(task)
    identity_block = isinstance(typed, LowRankSettings) and typed.identity_block
    if isinstance(typed, LowRankSettings):
        adds_bias = task.bases is not None and task.bases.centred
        task = replace(task, budget=replace(task.budget, identity_block=identity_block, adds_bias=adds_bias))
    replacements: Replacements = module.compress(task)
    if identity_block:
        replacements = with_identity_blocks(replacements)
    ranks = replace_modules(task.model, replacements)
    return {linear.name: ranks.get(linear.name) for linear in task.budget.modules}


def _with_dense_experts(task: CompressionTask) -> CompressionTask:
    """The task with a budget that leaves dense of what its bases or statistics hold nothing; the manifest names it."""
    shape = task.budget.dimensions
    files = task.bases.files if task.bases else []
    if task.statistics is not None:
        files = layer_files(task.statistics.folder, shape.layers)
    few = experts_left_dense(files, task.budget)
    if shape.experts:
        task.account["experts_left_dense"] = few
    for name, tokens in few.items():
        log.warning("%s got %d tokens, too few for statistics: its matrices stay dense", name, tokens)
    return replace(task, budget=with_dense(task.budget, few))


def with_identity_blocks(replacements: Replacements) -> Replacements:
    """The same maps, with an identity block in every pair.

    Raises:
        RankwiseError: a pair has not its full rank; the layer is named.
    """
    device = pick_device()

    def changed(name: str) -> Replacement:
        found = replacements[name]
        return IdentityBlockFactors.of(found, name, device) if isinstance(found, LowRankFactors) else found

    return Deferred(replacements, changed)
