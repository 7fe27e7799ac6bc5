"""Local distillation of features: the factors of one block are trained so that it puts out what the dense block does.

From Lillama (Sy, Cerisara, Illina, NAACL 2025, arXiv 2412.16719). y being what leaves a block of the dense model and a
what leaves the compressed one, for a token

    l(a, y) = mean_d |a - y| - log sigmoid(cos(a, y)),

averaged over tokens and added up over the inputs of the compressed block: those of the dense block (the paper's teacher
activations), and those that come out of the compressed blocks before it (student activations). Both times y is the
same. No gradient leaves the block.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional
from transformers import PreTrainedModel

from lowrank.config.tuning import FeatureDistillation
from lowrank.errors import RankwiseError
from lowrank.model.checkpoint import family_of
from lowrank.model.factors import factor_paths
from lowrank.model.modeling_rankwise import IdentityBlockLinear, LowRankLinear, SharedDownLinear
from lowrank.model.partial_forward import output_of
from lowrank.model.runtime import SEEDS_APART

log = logging.getLogger(__name__)

ALIKE = math.log1p(math.exp(-1))
"""What -log sigmoid(cos) is where two vectors have one direction, its least: left out, so that equal states lose 0."""


def feature_loss(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """How far hidden states are from others, ... x d each: the mean of l over tokens, less its least value."""
    distance = (outputs - targets).abs().mean(-1)
    cosine = functional.cosine_similarity(outputs, targets, dim=-1)
    return (distance + functional.softplus(-cosine)).mean() - ALIKE


@dataclass(frozen=True)
class Features:
    """Hidden states around a block, on the CPU.

    Attributes:
        ids: token ids, windows x length.
        entering: what the compressed block reads, one tensor for each of its inputs, windows x length x d.
        leaving: what leaves the dense block, of the same size.
    """

    ids: torch.Tensor
    entering: tuple[torch.Tensor, ...]
    leaving: torch.Tensor

    def windows(self, chosen: torch.Tensor | slice) -> Features:
        """Some of the windows."""
        return Features(self.ids[chosen], tuple(each[chosen] for each in self.entering), self.leaving[chosen])


@dataclass(frozen=True)
class Distilled:
    """What the training of a block came to.

    Attributes:
        weights: name in the model -> a factor's weight as trained, on the CPU, in the model's dtype.
        loss: (step, loss of that step's batch before its update).
        validation: (step, loss of the held-out windows after that many steps).
        best: step of the lowest validation loss, whose weights these are; 0: as compression left them.
    """

    weights: dict[str, torch.Tensor]
    loss: list[tuple[int, float]]
    validation: list[tuple[int, float]]
    best: int


def factor_weights(model: PreTrainedModel, layer: int) -> dict[str, nn.Parameter]:
    """The weights of a block's factors, by their names in the model.

    Pairs, pairs with an identity block on either side (without the identity), and shared first factors, each in the
    block that stores it. Layers that are no pairs have none.
    """
    name = f"{family_of(model).blocks}.{layer}"
    paths = [
        f"{name}.{inner}.{path}.weight"
        for inner, module in model.get_submodule(name).named_modules()
        if isinstance(module, LowRankLinear | IdentityBlockLinear)
        for path in factor_paths(module).values()
    ]
    weights = {path: model.get_parameter(path) for path in paths}
    return {path: weight for path, weight in weights.items() if weight.numel()}


def distil_block(
    model: PreTrainedModel, layer: int, features: Features, tuning: FeatureDistillation, seed: int
) -> Distilled:
    """Train the factors of one block, in place; all else of the model stays.

    The block runs in float32 meanwhile (float64 in a float64 model), since small steps would be lost in half precision.

    Args:
        model: the compressed model.
        layer: index of the block.
        features: of all windows; the last `validation_windows` are held out.
        tuning: the preset.
        seed: of the order of windows.

    Raises:
        RankwiseError: no window is left to train on, or a loss is not finite; the block is named.
    """
    if len(features.ids) <= tuning.validation_windows:
        raise RankwiseError(
            f"`validation_windows: {tuning.validation_windows}` of this tuning leaves none of the {len(features.ids)} "
            "calibration windows to train on. Lower it, or take a calibration with more windows."
        )
    with _trainable(model, layer) as weights:
        trainer = _Trainer(model, layer, features, tuning, seed, weights)
        trainer.run()
    learnt = {name: weight.detach().cpu().clone() for name, weight in factor_weights(model, layer).items()}
    return Distilled(learnt, trainer.loss, trainer.validation, trainer.best)


class _Trainer:
    """AdamW at a constant rate on the factors of a block, which end as they were at their best."""

    def __init__(
        self,
        model: PreTrainedModel,
        layer: int,
        features: Features,
        tuning: FeatureDistillation,
        seed: int,
        weights: dict[str, nn.Parameter],
    ) -> None:
        self.model, self.layer, self.tuning, self.weights = model, layer, tuning, list(weights.values())
        self.training = features.windows(slice(None, -tuning.validation_windows))
        self.held_out = features.windows(slice(-tuning.validation_windows, None))
        self.order = torch.Generator().manual_seed(seed * SEEDS_APART + layer)
        self.loss: list[tuple[int, float]] = []
        self.validation: list[tuple[int, float]] = []
        self.best = 0
        self.kept = self._copies()

    def run(self) -> None:
        """All epochs."""
        optimiser = torch.optim.AdamW(self.weights, lr=self.tuning.learning_rate, weight_decay=self.tuning.weight_decay)
        self._validate(0)
        batches = [batch for _ in range(self.tuning.epochs) for batch in self._epoch()]
        for step, batch in enumerate(batches, start=1):
            optimiser.zero_grad(set_to_none=True)
            self.loss.append((step, self._losses(self.training.windows(batch), backward=True)))
            self._check(self.loss[-1][1], f"the loss of step {step}")
            optimiser.step()
            if step % self.tuning.evaluate_every == 0 or step == len(batches):
                self._validate(step)
        for weight, copy in zip(self.weights, self.kept, strict=True):
            weight.data.copy_(copy)

    def _epoch(self) -> list[torch.Tensor]:
        """The windows of the steps of one pass."""
        return list(torch.split(torch.randperm(len(self.training.ids), generator=self.order), self.tuning.batch_size))

    def _validate(self, step: int) -> None:
        with torch.no_grad():
            parts = torch.split(torch.arange(len(self.held_out.ids)), self.tuning.batch_size)
            total = sum(self._losses(self.held_out.windows(part)) * len(part) for part in parts)
        loss = total / len(self.held_out.ids)
        self._check(loss, f"the validation loss after {step} steps")
        log.debug("block %d, step %d: validation loss %.5f", self.layer, step, loss)
        if step and loss < dict(self.validation)[self.best]:
            self.best, self.kept = step, self._copies()
        self.validation.append((step, loss))

    def _losses(self, features: Features, backward: bool = False) -> float:
        """The sum over the block's inputs; gradients add up, one input after the other, so that one graph is held."""
        device, dtype = self.weights[0].device, self.weights[0].dtype
        ids = features.ids.to(self.model.device)
        total = 0.0
        for entering in features.entering:
            outputs = output_of(self.model, ids, self.layer, entering.to(device, dtype))
            loss = feature_loss(outputs, features.leaving.to(outputs.device, dtype))  # the last block's come back
            if backward:
                torch.autograd.backward([loss])
            total += float(loss.detach())
        return total

    def _copies(self) -> list[torch.Tensor]:
        return [weight.detach().clone() for weight in self.weights]

    def _check(self, loss: float, what: str) -> None:
        if not math.isfinite(loss):
            name = f"{family_of(self.model).blocks}.{self.layer}"
            raise RankwiseError(f"{name}: {what} is not finite; lower `learning_rate` of this tuning")


@contextmanager
def _trainable(model: PreTrainedModel, layer: int) -> Iterator[dict[str, nn.Parameter]]:
    """Have a block in a wide dtype, with its factors trainable; a factor that it borrows is only widened."""
    block = model.get_submodule(f"{family_of(model).blocks}.{layer}")
    before = model.dtype
    wide = torch.promote_types(before, torch.float32)
    borrowed = [module.down for module in block.modules() if isinstance(module, SharedDownLinear)]
    for module in (block, *borrowed):
        module.to(wide)
    weights = factor_weights(model, layer)
    for weight in weights.values():
        weight.requires_grad_(True)
    try:
        yield weights
    finally:
        for weight in weights.values():
            weight.requires_grad_(False).grad = None
        for module in (block, *borrowed):
            module.to(before)
