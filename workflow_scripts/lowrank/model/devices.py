"""A model on one device, or block by block on several of a job: hidden states move on with them.

Every block first fetches what it is called with to where its own weights are, and what leaves the last one comes back
to the first device, where embeddings, the last norm and the head lie. So callers see one device, the first; numbers are
those of one device. Where each block lies is `placement`'s.
"""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from lowrank.model.modeling_rankwise import SharedDownLinear
from lowrank.model.placement import MODEL_GPUS, placed_blocks
from lowrank.model.runtime import pick_device

log = logging.getLogger(__name__)

Devices = torch.device | str | Sequence[torch.device]
"""Where a model is to lie: one device, or several, of which it takes what it needs of each."""

_MOVES: WeakKeyDictionary[nn.Module, list[RemovableHandle]] = WeakKeyDictionary()
"""Model -> what moves hidden states between its devices."""


def pick_devices() -> list[torch.device]:
    """The devices of this process for one model: all GPUs of a job that one process does, else one device."""
    first = pick_device()
    if first.type != "cuda" or (dist.is_initialized() and dist.get_world_size() > 1):
        return [first]
    count = min(int(os.environ.get(MODEL_GPUS) or 1), torch.cuda.device_count())
    return [torch.device("cuda", index) for index in range(count)] if count > 1 else [first]


def device_of(module: nn.Module) -> torch.device:
    """Where the weights of a module are."""
    return next(module.parameters()).device


def spread(
    model: PreTrainedModel, path: str, devices: Devices, beside: float = 0, around_beside: float = 0
) -> PreTrainedModel:
    """Put a model on its devices, in place; on several, each gets neighbouring blocks.

    Args:
        model: dense or compressed, wherever it is.
        path: of its blocks, as its family has it.
        devices: where it goes; on the first one is all that is no block.
        beside: bytes that will lie beside each block.
        around_beside: bytes that will lie on the first device besides.
    """
    for handle in _MOVES.pop(model, []):
        handle.remove()
    chosen = [torch.device(devices)] if isinstance(devices, (torch.device, str)) else list(devices)
    if len(chosen) == 1:
        model.to(chosen[0])
        return model
    blocks: Any = model.get_submodule(path)
    inside = {module for block in blocks for module in block.modules()}
    around = [module for module in model.modules() if module not in inside]
    sizes, outside = weights_of(model, path)
    places = placed_blocks([size + beside for size in sizes], outside + around_beside, len(chosen))
    for module in around:
        module._apply(lambda tensor: tensor.to(chosen[0]), recurse=False)
    for block, place in zip(blocks, places, strict=True):
        block.to(chosen[place])
    handles = [block.register_forward_pre_hook(_fetch, with_kwargs=True) for block in blocks]
    handles.append(blocks[-1].register_forward_hook(_BringTo(model.get_input_embeddings())))
    for shared in (module for module in model.modules() if isinstance(module, SharedDownLinear)):
        if device_of(shared.down) != device_of(shared.up):  # the factor of a block on another device
            handles += [part.register_forward_pre_hook(_fetch, with_kwargs=True) for part in (shared.down, shared.up)]
    _MOVES[model] = handles
    log.info("blocks on each device: %s", ", ".join(f"{chosen[k]}: {n}" for k, n in sorted(Counter(places).items())))
    return model


def weights_of(model: PreTrainedModel, path: str) -> tuple[list[float], float]:
    """Bytes of each block, and of all that is no block."""
    blocks: Any = model.get_submodule(path)
    inside = {module for block in blocks for module in block.modules()}
    return [_bytes(block.modules()) for block in blocks], _bytes(set(model.modules()) - inside)


def devices_of(model: nn.Module) -> list[torch.device]:
    """All devices that a model lies on, the first one first."""
    return list(dict.fromkeys(parameter.device for parameter in model.parameters()))


def _bytes(modules: Any) -> float:
    """Parameters of some modules themselves, tied ones once."""
    own = {parameter for module in modules for parameter in module.parameters(recurse=False)}
    return float(sum(parameter.numel() * parameter.element_size() for parameter in own))


def _fetch(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Hand a block what it is called with where it is."""
    device = device_of(block)
    return tuple(moved(value, device) for value in args), {name: moved(value, device) for name, value in kwargs.items()}


class _BringTo:
    """Bring what leaves a block to where another module is."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def __call__(self, block: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        return moved(output, device_of(self.module))

    def __deepcopy__(self, memo: dict[int, Any]) -> _BringTo:
        return self  # a copied block still belongs to its model


def moved(value: Any, device: torch.device) -> Any:
    """Tensors, also within tuples, lists and dicts, on a device; anything else, as a cache, as it is."""
    if isinstance(value, torch.Tensor):
        return value.to(device)
    if isinstance(value, (tuple, list)):
        return type(value)(moved(part, device) for part in value)
    if type(value) is dict:
        return {name: moved(part, device) for name, part in value.items()}
    return value
