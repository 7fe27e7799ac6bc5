"""Block influence: how much each block turns the residual stream (Men et al., ShortGPT, 2024).

BI = 1 - E[cos(x, y)] over tokens, with x the hidden states that enter a block and y those that leave it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from lowrank.calibration.moments import check_finite
from lowrank.calibration.statistics import TOKENS_PER_BATCH
from lowrank.model.checkpoint import family_of
from lowrank.model.devices import Devices
from lowrank.model.losses import last_hidden
from lowrank.model.partial_forward import on_devices


def block_influence(model: PreTrainedModel, tokens: torch.Tensor, devices: Devices) -> list[float]:
    """BI of every block, in one pass.

    Args:
        model: dense; it is on `devices` meanwhile.
        tokens: windows x length token ids.
        devices: where to run it.

    Raises:
        RankwiseError: hidden states that are not finite; the block is named.
    """
    family = family_of(model)
    blocks: Any = model.get_submodule(family.blocks)
    sums = [0.0] * len(blocks)

    def hook(layer: int) -> Any:
        def add(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            entered = args[0] if args else kwargs["hidden_states"]
            left = output[0] if isinstance(output, tuple) else output
            check_finite(left, f"{family.blocks}.{layer}: outputs")
            cosines = nn.functional.cosine_similarity(entered.double(), left.to(entered.device).double(), dim=-1)
            sums[layer] += float(cosines.sum())

        return add

    handles = [block.register_forward_hook(hook(layer), with_kwargs=True) for layer, block in enumerate(blocks)]
    try:
        # Only the passes: parameters that move in inference mode would take no part in a gradient any more.
        with on_devices(model, devices), torch.inference_mode():
            for batch in torch.split(tokens, max(1, TOKENS_PER_BATCH // tokens.shape[1])):
                last_hidden(model, batch.to(model.device))
    finally:
        for handle in handles:
            handle.remove()
    return [1 - total / tokens.numel() for total in sums]
