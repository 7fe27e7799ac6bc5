"""Forward passes that begin at a block, on hidden states kept from an earlier pass.

The model itself runs, with its masks and position embeddings; the blocks before the first one only pass on what they
are given. So the result equals that of a whole pass bit for bit, and no family needs code of its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from lowrank.model.checkpoint import family_of
from lowrank.model.devices import Devices, spread
from lowrank.model.losses import last_hidden


class _Reached(Exception):
    """Raised by a hook to leave a forward pass."""


@contextmanager
def on_devices(model: PreTrainedModel, devices: Devices, beside: float = 0) -> Iterator[None]:
    """Have a model, which is on one device, on one or several for a while; with so many bytes beside each block."""
    before, path = model.device, family_of(model).blocks
    spread(model, path, devices, beside)
    try:
        yield
    finally:
        spread(model, path, before)


@contextmanager
def exchanged(model: PreTrainedModel, modules: Mapping[str, nn.Module]) -> Iterator[None]:
    """Have other modules in a model for a while.

    Args:
        model: changed in place, and changed back.
        modules: module name -> what stands in its place.
    """
    before = {name: model.get_submodule(name) for name in modules}
    try:
        for name, module in modules.items():
            _put(model, name, module)
        yield
    finally:
        for name, module in before.items():
            _put(model, name, module)


def last_hidden_from(model: PreTrainedModel, ids: torch.Tensor, block: int, hidden: torch.Tensor) -> torch.Tensor:
    """`last_hidden` of a model, of which only the blocks from `block` on are run.

    Args:
        model: a dense or compressed model of a known family.
        ids: token ids, batch x length, on the model's device.
        block: the first block to run.
        hidden: batch x length x d, the hidden states that enter it.

    Returns:
        batch x length x d, after the final norm.
    """
    with _beginning_at(model, block, hidden):
        return last_hidden(model, ids)


def input_of(model: PreTrainedModel, name: str, ids: torch.Tensor, block: int, hidden: torch.Tensor) -> torch.Tensor:
    """What a module reads in a pass that begins at a block and ends before the module.

    Args:
        model: a dense or compressed model of a known family.
        name: of a block, or of a module inside one, not before `block`.
        ids: token ids, batch x length, on the model's device.
        block: the first block to run.
        hidden: batch x length x d, the hidden states that enter it.

    Returns:
        The module's first argument.
    """
    with _beginning_at(model, block, hidden):
        return _first_argument(model, name, ids)


def output_of(model: PreTrainedModel, ids: torch.Tensor, block: int, hidden: torch.Tensor) -> torch.Tensor:
    """The hidden states that leave a block, batch x length x d, when `hidden` of that size enters it.

    Args:
        model: a dense or compressed model of a known family.
        ids: token ids, batch x length, on the model's device.
        block: the block.
        hidden: what enters it; gradients go through.
    """
    caught: list[torch.Tensor] = []

    def leave(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        caught.append(output[0] if isinstance(output, tuple) else output)
        raise _Reached

    handle = model.get_submodule(f"{family_of(model).blocks}.{block}").register_forward_hook(leave)
    try:
        with _beginning_at(model, block, hidden):
            last_hidden(model, ids)
    except _Reached:
        pass
    finally:
        handle.remove()
    (found,) = caught
    return found


def block_input(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    """The hidden states that enter the first block: batch x length x d."""
    return _first_argument(model, f"{family_of(model).blocks}.0", ids)


def _first_argument(model: PreTrainedModel, name: str, ids: torch.Tensor) -> torch.Tensor:
    caught: list[torch.Tensor] = []

    def leave(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        caught.append(args[0] if args else kwargs["hidden_states"])
        raise _Reached

    handle = model.get_submodule(name).register_forward_pre_hook(leave, with_kwargs=True)
    try:
        last_hidden(model, ids)
    except _Reached:
        pass
    finally:
        handle.remove()
    (found,) = caught
    return found


@contextmanager
def _beginning_at(model: PreTrainedModel, block: int, hidden: torch.Tensor) -> Iterator[None]:
    """Let the blocks before `block` pass on what they are given, and `block` read `hidden`."""
    blocks: Any = model.get_submodule(family_of(model).blocks)

    def read(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], Any]:
        return (hidden, *args[1:]), {key: value for key, value in kwargs.items() if key != "hidden_states"}

    handle = blocks[block].register_forward_pre_hook(read, with_kwargs=True, prepend=True)
    for skipped in blocks[:block]:
        skipped.forward = _pass_on
    try:
        yield
    finally:
        handle.remove()
        for skipped in blocks[:block]:
            del skipped.forward  # the class's own again


def _pass_on(hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    return hidden_states


def _put(model: PreTrainedModel, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)
