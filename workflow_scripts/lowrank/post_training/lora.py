"""LoRA on a compressed model, and its exact merge.

An m x n weight gets an update of rank r: `y = W x + s B A dropout(x)`, s = alpha / r, with A (r x n) random and B
(m x r) zero at the start. A dense layer has one weight, whether it is smaller than its architecture's or not; a
low-rank pair has two, `down` and `up` (`rest` where a block of it is the identity), and the update of each merges into
it, so ranks stay. The trained layers are those of peft.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import nn
from transformers import PreTrainedModel

from lowrank.config.tuning import LoraTuning
from lowrank.errors import RankwiseError
from lowrank.model.checkpoint import family_of
from lowrank.model.factors import factor_paths
from lowrank.model.modeling_rankwise import IdentityBlockLinear, LowRankLinear

Stage = Literal["all", "up", "down"]
ADAPTER = "default"
"""peft's name of an adapter that has none."""


@dataclass(frozen=True)
class LoraMatrices:
    """What LoRA learns about one weight.

    Attributes:
        a: A, r x n.
        b: B, m x r.
    """

    a: torch.Tensor
    b: torch.Tensor


def target_weights(model: PreTrainedModel, targets: list[str] | None, stage: Stage) -> Iterator[str]:
    """Names of the linear modules whose weights a stage trains, block by block; a layer without channels has none.

    Args:
        model: a compressed (or dense) model.
        targets: types of linear layers; None: all of its family.
        stage: `all`, or which factor of low-rank pairs; dense layers are left alone then.

    Raises:
        RankwiseError: a type that the family does not have, or a layer that is neither dense nor a pair.
    """
    family = family_of(model)
    known = list(dict.fromkeys(linear.name for linear in family.types))
    if unknown := [name for name in targets or [] if name not in known]:
        raise RankwiseError(
            f"`targets` of this tuning: family '{family.model_type}' has no linear layers of type "
            f"{', '.join(unknown)}; it has {', '.join(known)}"
        )
    blocks = model.get_submodule(family.blocks)
    assert isinstance(blocks, nn.ModuleList)
    for index in range(len(blocks)):
        for linear in family.types:
            name = f"{family.blocks}.{index}.{linear.path}"
            module = model.get_submodule(name)
            if targets is not None and linear.name not in targets:
                continue
            if isinstance(module, LowRankLinear | IdentityBlockLinear):
                parts = [f"{name}.{path}" for part, path in factor_paths(module).items() if stage in ("all", part)]
                yield from (part for part in parts if model.get_parameter(f"{part}.weight").numel())
            elif not isinstance(module, nn.Linear):
                raise RankwiseError(
                    f"{name}: LoRA trains dense layers and low-rank pairs, and this is a {type(module).__name__}. "
                    f"Leave its type ('{linear.name}') out of `targets`."
                )
            elif stage == "all" and module.weight.numel():
                yield name


def attach_lora(model: PreTrainedModel, tuning: LoraTuning, stage: Stage, seed: int) -> dict[str, nn.Module]:
    """Wrap the weights of a stage, in place, and freeze everything but the new matrices.

    These are float32 (float64 on a float64 weight), since small steps of an optimiser are lost in bfloat16.

    Returns:
        Name of the linear module -> its trainable wrapper.

    Raises:
        RankwiseError: there is nothing to train, or a wrong target.
    """
    names = list(target_weights(model, tuning.targets, stage))
    if not names:
        raise RankwiseError(
            f"stage `{stage}` of this tuning finds nothing to train: "
            + ("`targets` leaves no layer. " if stage == "all" else "none of its layers is a low-rank pair. ")
            + "Change `stages` or `targets`, or take `tuning: none` for this row."
        )
    family = family_of(model)
    # Of a model that says to have experts, peft looks for their stacked matrices; blocks by themselves say nothing.
    within = f"{family.blocks}." if family.experts else ""
    config = LoraConfig(
        r=tuning.rank,
        lora_alpha=tuning.alpha,  # type: ignore[arg-type]  # peft divides it by r, so it need not be a whole number
        lora_dropout=tuning.dropout,
        target_modules="|".join(re.escape(name.removeprefix(within)) for name in names),
    )
    inject_adapter_in_model(config, model.get_submodule(within.rstrip(".")))
    model.requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    wrapped = {name: model.get_submodule(name) for name in names}
    for layer in wrapped.values():
        _start(layer, generator)
    return wrapped


def _start(layer: Any, generator: torch.Generator) -> None:
    """Give a wrapper its first matrices, the same on every process and device; it is left without dropout."""
    weight: torch.Tensor = layer.get_base_layer().weight
    dtype = torch.promote_types(weight.dtype, torch.float32)
    a, b = layer.lora_A[ADAPTER], layer.lora_B[ADAPTER]
    first = torch.empty(a.weight.shape, dtype=torch.float32)
    nn.init.kaiming_uniform_(first, a=math.sqrt(5), generator=generator)
    a.weight = nn.Parameter(first.to(weight.device, dtype))
    b.weight = nn.Parameter(torch.zeros(b.weight.shape, dtype=dtype, device=weight.device))
    layer.eval()


def learnt_matrices(layer: Any) -> LoraMatrices:
    """Copies of a wrapper's matrices, on the host."""
    a, b = (side[ADAPTER].weight.detach().cpu().clone() for side in (layer.lora_A, layer.lora_B))
    return LoraMatrices(a, b)


@torch.no_grad()
def merge_lora(model: nn.Module, matrices: Mapping[str, LoraMatrices], scale: float) -> None:
    """Add trained updates to the weights of a model without adapters, in place; shapes and dtypes stay.

    `W += scale B A`, in float64, rounded once to the dtype of W.

    Args:
        model: the model as it was before this stage.
        matrices: name of the linear module -> what was learnt.
        scale: alpha / rank.
    """
    for name, learnt in matrices.items():
        weight = model.get_submodule(name).get_parameter("weight")
        a, b = (side.to(weight.device).double() for side in (learnt.a, learnt.b))
        weight.copy_((weight.double() + scale * (b @ a)).to(weight.dtype))
