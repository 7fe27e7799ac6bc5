"""A model whose linear layers change rank without being rebuilt: a trial of the search only slices views."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from transformers import PreTrainedModel

from lowrank.bases.principal import Bases, PrincipalBasis, bias_of
from lowrank.calibration.routing import experts_left_dense, with_dense
from lowrank.config.sources import ModelShape
from lowrank.errors import RankwiseError
from lowrank.files import layer_files
from lowrank.model.checkpoint import load_checkpoint
from lowrank.model.devices import pick_devices
from lowrank.model.runtime import limit_threads, parse_dtype
from lowrank.model.tokenizer import load_tokenizer
from lowrank.ranks.budget import Budget


class SlicedLinear(nn.Module):
    """A dense layer and its principal basis; `rank` says which of them runs.

    Both factors lie row by row of the rank's dimension, so that a rank is a contiguous prefix of either, and rows begin
    where those of the model's own weights would. Slices of columns of an m x k matrix have a stride of k = mn / (m + n)
    elements, which is seldom a multiple of what fast products of 16-bit numbers need on a GPU. On a CPU 16-bit products
    with the second factor that way round took 4 to 10 times as long as with columns, so there it lies by columns.

    Attributes:
        rank: the rank in use, or None for the dense layer.
        directions: U', k x m.
        projection: U' W, k x n.
    """

    def __init__(self, dense: nn.Linear, basis: PrincipalBasis, where: str = "layer") -> None:
        super().__init__()
        held, wanted = (tuple(basis.directions.shape), tuple(basis.projection.shape)), tuple(dense.weight.shape)
        if held != ((wanted[0], held[1][0]), (held[1][0], wanted[1])):
            raise RankwiseError(
                f"{where}: its weight is {wanted[0]} x {wanted[1]}, and the directions and the projection of its basis "
                f"are {' and '.join(' x '.join(map(str, shape)) for shape in held)}, so the basis was made for "
                "something else. Delete the folder of the bases and run the workflow again."
            )
        self.dense = dense
        self.in_features = dense.in_features
        like = dense.weight
        by_columns = like.device.type == "cpu" and like.dtype.itemsize == 2
        directions = basis.directions.to(like)
        self.directions = directions.contiguous().T if by_columns else directions.T.contiguous()
        self.projection = basis.projection.to(like).contiguous()
        self.mean = None if basis.mean is None else basis.mean.to(like.device)
        self.projected_mean = None if basis.projected_mean is None else basis.projected_mean.to(like.device)
        self.rank: int | None = None
        self._bias: torch.Tensor | None = None

    def set_rank(self, rank: int | None) -> None:
        """Use the first `rank` directions, or the dense layer.

        Raises:
            RankwiseError: the rank is beyond what the basis holds.
        """
        held = len(self.directions)
        if rank is not None and not 1 <= rank <= held:  # a slice would silently be shorter
            raise RankwiseError(f"rank {rank} is not within 1 to {held}, what the basis holds")
        self.rank = rank
        if rank is not None:
            bias = bias_of(self.mean, self.projected_mean, self.directions[:rank].T.float())
            self._bias = None if bias is None else bias.to(self.directions.dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (..., n) to (..., m)."""
        if self.rank is None:
            dense: torch.Tensor = self.dense(x)
            return dense
        hidden = functional.linear(x, self.projection[: self.rank])
        return functional.linear(hidden, self.directions[: self.rank].T, self._bias)


class SlicedModel:
    """A dense model that takes on the ranks of an allocation.

    Attributes:
        model: the model, with `SlicedLinear` in place of every layer that has a basis.
    """

    def __init__(self, model: PreTrainedModel, budget: Budget, bases: Bases) -> None:
        self.model = model
        self.layers: dict[str, SlicedLinear] = {}
        for module in budget.free(()):  # those of experts that are left dense have no basis
            parent, _, child = module.name.rpartition(".")
            dense: nn.Linear = model.get_submodule(module.name)
            basis = bases.of(module.layer, module.type.key, dense.weight)
            layer = SlicedLinear(dense, basis, module.name)
            setattr(model.get_submodule(parent), child, layer)
            self.layers[module.name] = layer

    def set_ranks(self, ranks: Mapping[str, int | None]) -> None:
        """Take on an allocation; modules that it does not name are dense."""
        for name, layer in self.layers.items():
            layer.set_rank(ranks.get(name))


@dataclass(frozen=True)
class OpenedModel:
    """What the stages that try allocations work with.

    The budget counts biases if the bases have means, and leaves layers dense of which they hold nothing.
    """

    sliced: SlicedModel
    tokenizer: Any
    budget: Budget
    device: torch.device


def open_sliced_model(folder: str, bases: str, settings: dict[str, Any], threads: int) -> OpenedModel:
    """Open a dense checkpoint on this job's device or devices, each basis beside its layer.

    Args:
        folder: the dense checkpoint.
        bases: the folder of its bases, one file per block.
        settings: the rule's settings, with `dtype` and `shape`.
        threads: of the rule.
    """
    limit_threads(threads)
    dtype, shape = parse_dtype(settings["dtype"]), ModelShape.model_validate(settings["shape"])
    opened = Bases(bases, shape.layers)
    beside = layer_files(bases, shape.layers)[0].stat().st_size * dtype.itemsize / torch.float32.itemsize
    model = load_checkpoint(folder, dtype, pick_devices(), beside)
    few = experts_left_dense(opened.files, Budget.of(shape))
    budget = replace(with_dense(Budget.of(shape), few), adds_bias=opened.centred)
    return OpenedModel(
        SlicedModel(model, budget, opened),
        load_tokenizer(folder),
        budget,
        model.device,
    )
