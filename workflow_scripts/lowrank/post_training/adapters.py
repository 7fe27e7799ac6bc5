"""What a tuning preset trains, behind one interface: the loop, its checkpoints and the merge know no kind.

A preset has one or more stages. Each attaches trainable layers to the model as the stages before left it, and its
result is merged before the next begins.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn
from transformers import PreTrainedModel

from lowrank.config.tuning import LoraTuning, ScaledSubspaceTuning
from lowrank.post_training.lora import LoraMatrices, attach_lora, learnt_matrices, merge_lora
from lowrank.post_training.subspace import (
    ScaledSubspaceLinear,
    SubspaceVectors,
    attach_subspaces,
    merge_subspaces,
    unpack_vectors,
)

AnyPreset = ScaledSubspaceTuning | LoraTuning
Learnt = SubspaceVectors | LoraMatrices
"""What is learnt about one layer: a dataclass of tensors; those of integers are choices, not learnt."""


def stages_of(tuning: AnyPreset) -> list[str]:
    """What each stage of a preset trains, in order."""
    return list(tuning.stages) if isinstance(tuning, LoraTuning) else ["scales"]


def attach(model: PreTrainedModel, tuning: AnyPreset, stage: int, seed: int) -> dict[str, nn.Module]:
    """Make the layers of a stage trainable, in place, and freeze all else.

    Returns:
        Name of the layer -> its trainable wrapper.

    Raises:
        RankwiseError: there is nothing to train.
    """
    if isinstance(tuning, LoraTuning):
        return attach_lora(model, tuning, tuning.stages[stage], seed)
    return {**attach_subspaces(model, tuning.rank, tuning.subspace, seed)}


def learnt_by(layer: nn.Module) -> Learnt:
    """What a wrapper holds now, copied to the host."""
    if isinstance(layer, ScaledSubspaceLinear):
        copies = (tensor.detach().cpu().clone() for tensor in (layer.indices, layer.inner, layer.outer))
        return SubspaceVectors(*copies)
    return learnt_matrices(layer)


def merge(model: PreTrainedModel, tuning: AnyPreset, tensors: Mapping[str, torch.Tensor]) -> None:
    """Fold what a stage learnt, as `pack_vectors` gave it, into the model as it was before that stage, in place."""
    if isinstance(tuning, LoraTuning):
        names = sorted({key.rpartition(":")[0] for key in tensors})
        matrices = {name: LoraMatrices(tensors[f"{name}:a"], tensors[f"{name}:b"]) for name in names}
        merge_lora(model, matrices, tuning.alpha / tuning.rank)
    else:
        merge_subspaces(model, unpack_vectors(tensors))


def trained_numbers(tensors: Mapping[str, torch.Tensor]) -> int:
    """How many numbers a stage trained, of the tensors that `pack_vectors` gave."""
    return sum(tensor.numel() for tensor in tensors.values() if tensor.is_floating_point())
