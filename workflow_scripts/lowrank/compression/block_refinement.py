"""Training the pairs of one block so that it puts out what the dense one does, on inputs of the compressed model.

The loss is the mean square error of the hidden states that leave the block; nothing else of the model is trained. The
block runs in float32 meanwhile (float64 in a float64 model), since small steps would be lost in half precision.
"""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import nn
from transformers import PreTrainedModel

from lowrank.errors import RankwiseError
from lowrank.model.checkpoint import family_of
from lowrank.model.devices import device_of
from lowrank.model.factors import LowRankFactors
from lowrank.model.partial_forward import exchanged, output_of
from lowrank.model.runtime import SEEDS_APART

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class BlockRefinement:
    """AdamW on the factors of a block's pairs; biases stay.

    Attributes:
        model: the dense model, on `device`; changed, and changed back.
        device: where it is.
        epochs: passes over the windows.
        learning_rate: constant.
        batch_size: windows a step.
        seed: of the order of windows.
    """

    model: PreTrainedModel
    device: torch.device
    epochs: int
    learning_rate: float
    batch_size: int
    seed: int

    def __call__(
        self,
        layer: int,
        pairs: Mapping[str, LowRankFactors],
        batches: list[torch.Tensor],
        entering: list[torch.Tensor],
        leaving: list[torch.Tensor],
    ) -> dict[str, LowRankFactors]:
        """The pairs after training, or as they were if that has made the error no smaller; see `Refine`.

        Raises:
            RankwiseError: the error is not finite; the block is named.
        """
        name = f"{family_of(self.model).blocks}.{layer}"
        dtype = torch.promote_types(self.model.dtype, torch.float32)
        place = device_of(self.model.get_submodule(name))
        running = {pair: factors.as_module(dtype, place) for pair, factors in pairs.items()}
        block = {name: copy.deepcopy(self.model.get_submodule(name)).to(dtype)}
        with exchanged(self.model, block), exchanged(self.model, running):
            data = [torch.cat(parts) for parts in (batches, entering, leaving)]
            before = self._error(layer, *data)
            self._train(layer, list(running.values()), *data)
            after = self._error(layer, *data)
        if not math.isfinite(after):
            raise RankwiseError(f"{name}: the error of its outputs is not finite; lower `learning_rate`")
        log.info("refined block %d: mean square error %.3g, before %.3g", layer, after, before)
        if after >= before:
            return dict(pairs)
        return {
            pair: replace(factors, down=_of(running[pair], "down"), up=_of(running[pair], "up"))
            for pair, factors in pairs.items()
        }

    def _train(
        self, layer: int, running: list[nn.Module], ids: torch.Tensor, entering: torch.Tensor, leaving: torch.Tensor
    ) -> None:
        weights = [module.get_parameter(f"{part}.weight") for module in running for part in ("down", "up")]
        for weight in weights:
            weight.requires_grad_(True)
        optimiser = torch.optim.AdamW(weights, lr=self.learning_rate)
        generator = torch.Generator().manual_seed(self.seed * SEEDS_APART + layer)
        with torch.enable_grad():
            for _ in range(self.epochs):
                for chosen in torch.split(torch.randperm(len(ids), generator=generator), self.batch_size):
                    optimiser.zero_grad(set_to_none=True)
                    torch.autograd.backward([self._loss(layer, ids[chosen], entering[chosen], leaving[chosen])])
                    optimiser.step()
        for weight in weights:
            weight.requires_grad_(False)

    def _loss(self, layer: int, ids: torch.Tensor, entering: torch.Tensor, leaving: torch.Tensor) -> torch.Tensor:
        """Mean square error over windows, tokens and channels."""
        dtype = torch.promote_types(self.model.dtype, torch.float32)
        read, right = (states.to(self.device, dtype) for states in (entering, leaving))
        out = output_of(self.model, ids.to(self.device), layer, read)
        return nn.functional.mse_loss(out, right.to(out.device))

    def _error(self, layer: int, ids: torch.Tensor, entering: torch.Tensor, leaving: torch.Tensor) -> float:
        """The same over all windows, without gradients."""
        with torch.no_grad():
            parts = zip(*(torch.split(each, self.batch_size) for each in (ids, entering, leaving)), strict=True)
            return sum(float(self._loss(layer, *part)) * len(part[0]) for part in parts) / len(ids)


def _of(layer: nn.Module, part: str) -> torch.Tensor:
    """A factor's trained weight, on the CPU."""
    return layer.get_parameter(f"{part}.weight").detach().cpu()
