"""Gradients of the language-model loss with respect to the weights of linear layers, summed over sequences.

The weights themselves stay frozen. A hook on each layer catches its inputs x_t and the gradients d_t of its outputs,
and the layer's gradient is sum_t d_t x_t', formed in float32 whatever the model's dtype. So no gradient is ever held
in the model's own precision, and squares of the gradients of single sequences cost no more than the gradients.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from lowrank.errors import RankwiseError
from lowrank.model import losses
from lowrank.model.checkpoint import family_of
from lowrank.model.devices import Devices
from lowrank.model.losses import Head, draw_tokens, head_of, last_hidden, token_nll
from lowrank.model.partial_forward import on_devices

log = logging.getLogger(__name__)


def sum_gradients(
    model: PreTrainedModel,
    tokens: torch.Tensor,
    names: Iterable[str],
    devices: Devices,
    squared: bool = False,
    batch_size: int = 1,
) -> dict[str, torch.Tensor]:
    """Sums over sequences of the gradients of each sequence's mean next-token loss.

    The loss of a sequence s of T tokens is L_s = (1 / (T - 1)) sum_t -log p(x_t | x_<t). Returned is sum_s dL_s/dW;
    divided by the number of sequences it is the gradient of the mean loss over all of them.

    Args:
        model: a dense model of a known family; it is left as it was (device, mode, hooks, what requires gradients).
        tokens: sequences x length, token ids without padding.
        names: module names of linear layers of its blocks (as in `Budget.modules`).
        devices: where to compute; the model is there meanwhile.
        squared: sum the elementwise squares of each sequence's own gradient instead: sum_s (dL_s/dW)^2, which over
            the number of sequences is the diagonal of the empirical Fisher information.
        batch_size: sequences at a time; it does not change the result, beyond rounding.

    Returns:
        Name -> m x n like the layer's weight, in float32 (float64 for float64 models), on the CPU.

    Raises:
        RankwiseError: a name that is no linear layer, sequences without a next token, a loss or gradient that is not
            finite; the layer is named.
    """
    layers = {name: _linear(model, name) for name in names}
    if tokens.dim() != 2 or tokens.shape[0] == 0 or tokens.shape[1] < 2:
        raise RankwiseError(
            f"gradients need at least one sequence of two tokens or more; there are {tuple(tokens.shape)}"
        )
    started = time.monotonic()
    accumulators = {name: torch.promote_types(layer.weight.dtype, torch.float32) for name, layer in layers.items()}
    summed = sum(layer.weight.numel() * accumulators[name].itemsize for name, layer in layers.items())
    with _frozen(model, devices, summed / len(model.get_submodule(family_of(model).blocks))):
        sums = {name: torch.zeros_like(layer.weight, dtype=accumulators[name]) for name, layer in layers.items()}
        with _caught(model, layers, sums, squared), torch.enable_grad():
            for ids in torch.split(tokens, batch_size):
                backpropagate(model, ids.to(model.device))
    # The losses were summed over a sequence's tokens, whose gradients float16 can hold; the mean is taken here.
    scale = 1 / (tokens.shape[1] - 1)
    sums = {name: total.mul_(scale**2 if squared else scale).cpu() for name, total in sums.items()}
    _require_finite(sums)
    rate = tokens.numel() / (time.monotonic() - started)
    log.info("gradients of %d layers over %d sequences, %.0f tokens/s", len(layers), len(tokens), rate)
    return sums


def mean_gradients(
    model: PreTrainedModel, tokens: torch.Tensor, names: Iterable[str], devices: Devices
) -> dict[str, torch.Tensor]:
    """The gradient of the mean loss over all sequences, by layer; see `sum_gradients` for the rest."""
    return {name: total.div_(len(tokens)) for name, total in sum_gradients(model, tokens, names, devices).items()}


def _linear(model: PreTrainedModel, name: str) -> nn.Linear:
    try:
        layer = model.get_submodule(name)
    except AttributeError as error:
        raise RankwiseError(f"{name}: the model has no such layer to take gradients of") from error
    if not isinstance(layer, nn.Linear):
        raise RankwiseError(f"{name}: gradients are taken of dense linear layers, not of {type(layer).__name__}")
    return layer


@contextmanager
def _frozen(model: PreTrainedModel, devices: Devices, beside: float) -> Iterator[None]:
    """The model on devices, in evaluation mode, with no parameter that requires a gradient; afterwards as before.

    With so many bytes beside each block.
    """
    modes = {module: module.training for module in model.modules()}
    required = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        model.eval().requires_grad_(False)
        with on_devices(model, devices, beside):
            yield
    finally:
        for parameter in required:
            parameter.requires_grad_(True)
        for module, training in modes.items():
            module.training = training


@contextmanager
def _caught(
    model: PreTrainedModel, layers: dict[str, nn.Linear], sums: dict[str, torch.Tensor], squared: bool
) -> Iterator[None]:
    """Hooks that add the gradients of each backward pass to `sums`."""

    def record(total: torch.Tensor, inputs: torch.Tensor, outputs: Any, sequences: int) -> None:
        x = inputs.detach().flatten(0, -2)

        def add(gradient: torch.Tensor) -> None:
            d = gradient.flatten(0, -2)
            if squared:
                for one_d, one_x in zip(d.chunk(sequences), x.chunk(sequences), strict=True):
                    total.add_((one_d.T.to(total.dtype) @ one_x.to(total.dtype)).square_())
            else:
                total.addmm_(d.T.to(total.dtype), x.to(total.dtype))

        outputs.register_hook(add)

    sequences = [0]

    def begin(module: nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor:
        sequences[0] = output.shape[0]
        return output.requires_grad_(True)  # the graph starts here, since no parameter is part of it

    def hook(total: torch.Tensor) -> Any:
        return lambda module, args, output: record(total, args[0], output, sequences[0])

    handles = [model.get_input_embeddings().register_forward_hook(begin)]
    handles += [layer.register_forward_hook(hook(sums[name])) for name, layer in layers.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def backpropagate(
    model: PreTrainedModel, ids: torch.Tensor, draw: torch.Generator | None = None, draws: int = 1
) -> None:
    """Backward passes of the loss summed over all next tokens, with the logits of one chunk at a time.

    Args:
        model: with hooks that use the gradients.
        ids: sequences x length.
        draw: where to draw next tokens from the model's own predictions; None: those of the text.
        draws: backward passes after one forward pass, each with tokens drawn anew.

    Raises:
        RankwiseError: the loss is not finite; the first layer whose outputs are not is named.
    """
    hidden, head = last_hidden(model, ids)[:, :-1].flatten(0, 1), head_of(model)
    for left in reversed(range(draws)):
        gradient = _final_gradient(hidden.detach(), head, ids[:, 1:].flatten() if draw is None else draw)
        if gradient is None:
            where = first_not_finite(model, ids)
            raise RankwiseError(
                f"{where}: outputs are not finite, so the loss of a calibration window is not finite. Set `dtype: "
                "float32` for this model in the config; if it is float32 already, the weights are damaged."
            )
        torch.autograd.backward([hidden], [gradient], retain_graph=left > 0)


def _final_gradient(hidden: torch.Tensor, head: Head, targets: torch.Tensor | torch.Generator) -> torch.Tensor | None:
    """Gradient of the summed loss at final hidden states, T x d; None if the loss is not finite."""
    gradients: list[torch.Tensor] = []
    loss = 0.0
    for start in range(0, len(hidden), losses.CHUNK_TOKENS):
        part = slice(start, start + losses.CHUNK_TOKENS)
        states = hidden[part]
        next_tokens = targets[part] if isinstance(targets, torch.Tensor) else draw_tokens(states, head, targets)
        states.requires_grad_(True)
        total = token_nll(states, head, next_tokens).sum()
        gradients.extend(torch.autograd.grad(total, states))
        loss += float(total.detach())
    return torch.cat(gradients) if math.isfinite(loss) else None


def first_not_finite(model: PreTrainedModel, ids: torch.Tensor) -> str:
    """Name of the first module whose outputs on a batch are not finite; that of the whole model if there is none."""
    found: list[str] = []

    def look(name: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            if not found and isinstance(output, torch.Tensor) and not bool(output.isfinite().all()):
                found.append(name)

        return hook

    leaves = [(name, module) for name, module in model.named_modules() if not any(module.children())]
    handles = [module.register_forward_hook(look(name)) for name, module in leaves]
    try:
        model(input_ids=ids, use_cache=False, logits_to_keep=1)
    finally:
        for handle in handles:
            handle.remove()
    return found[0] if found else type(model).__name__


def _require_finite(sums: dict[str, torch.Tensor]) -> None:
    """Name the damaged layer that is nearest to the loss: from there a backward pass spreads what is not finite."""
    damaged = [name for name, total in sums.items() if not bool(total.isfinite().all())]
    if damaged:
        raise RankwiseError(
            f"{damaged[-1]}: its gradient is not finite. Set `dtype: float32` (or `bfloat16`) for this model in the "
            "config; if it is float32 already, look for damaged weights."
        )
