"""Masks over the directions of decomposed matrices, trained so that hidden states stay those of the dense model.

Each matrix is W = B A with all of its directions, and runs as B diag(m) A. Each direction has a logit w; in training
its mask is drawn anew in every step,

    m = 1 if sigmoid((w + g) / t) > 1/2 else 0,    g a Gumbel variate,

so that it is 1 with probability 1 - exp(-exp(w)), and the gradient goes through as if m were the sigmoid itself
(straight through). The loss is the square error of the hidden states after the middle block and in front of the head,
of each token as a share of its own size (the first token's states are a thousand times as large as others), plus
`pressure` times the mean logit, directions weighed by their parameters. The pressure grows from step to step until the
directions with w > 0 meet the budget; then it acts only where they do not, for some steps more, in which the loss alone
exchanges directions.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from transformers import PreTrainedModel

from lowrank.errors import RankwiseError
from lowrank.jobs.state import Parts
from lowrank.model.checkpoint import family_of
from lowrank.model.losses import last_hidden
from lowrank.model.partial_forward import exchanged

log = logging.getLogger(__name__)

FIRST_LOGIT, LAST_LOGIT = 6.0, 3.0
"""Of the directions in the order of their singular values, at the start."""
LARGEST_GROWTH = 60
"""As the exponent of e: what is left of float32 then holds sums of all logits."""
FIRST_SCALE = 2.0**32
"""Of the loss in backward passes. The gradient by a hidden state is about one over the number of tokens and the state's
size, which float16 rounds to zero. Where a gradient overflows, the scale is halved; a power of two changes no digit."""
STEPS_KEPT = 50
"""Another try begins at most so many steps before the stop."""


class MaskedLinear(nn.Module):
    """y = up (mask * (down x)) + bias; all but the mask is frozen.

    Attributes:
        mask: k, set anew for each pass.
    """

    down: torch.Tensor
    up: torch.Tensor
    bias: torch.Tensor | None
    mask: torch.Tensor

    def __init__(self, down: torch.Tensor, up: torch.Tensor, bias: torch.Tensor | None) -> None:
        """Args: down: k x n; up: m x k; bias: m, or None; all on one device."""
        super().__init__()
        self.down, self.up, self.bias, self.mask = down, up, bias, torch.ones_like(up[0])

    def placed(self, device: torch.device | str) -> MaskedLinear:
        """The same on another device."""
        return MaskedLinear(
            self.down.to(device), self.up.to(device), None if self.bias is None else self.bias.to(device)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (..., n) to (..., m)."""
        return functional.linear(functional.linear(x, self.down) * self.mask.to(x.dtype), self.up, self.bias)


@dataclass(frozen=True)
class MaskTraining:
    """How masks are trained.

    Attributes:
        steps: at most.
        batch_size: windows a step, drawn at random.
        learning_rate: of Adam, on the logits.
        temperature: t.
        pressure: on the mean logit, in the first step.
        growth: by which share it grows from step to step, until the budget is met.
        settle: steps from then on.
        seed: of windows and masks.
    """

    steps: int
    batch_size: int
    learning_rate: float
    temperature: float
    pressure: float
    growth: float
    settle: int
    seed: int


@dataclass
class _Course:
    """How far the training is.

    Attributes:
        step: the next one.
        met: the first step before which the budget was met; None before that.
        best: the logits that met it last.
        scale: of the loss in backward passes.
    """

    step: int = 0
    met: int | None = None
    best: torch.Tensor | None = None
    scale: float = FIRST_SCALE


def trained_masks(
    model: PreTrainedModel,
    tokens: torch.Tensor,
    layers: Mapping[str, MaskedLinear],
    enough: Callable[[dict[str, int]], bool],
    training: MaskTraining,
    device: torch.device,
    parts: Parts | None = None,
) -> dict[str, torch.Tensor]:
    """The logits of every matrix's directions, k each, float32 on the CPU.

    Args:
        model: the dense model; its embeddings are on `device`; changed, and changed back.
        tokens: windows x length token ids.
        layers: what stands in the place of its matrices, each where that is.
        enough: whether so many directions of each matrix meet the budget.
        training: how.
        device: of the logits.
        parts: where the state is kept from time to time, and found again; it must be of the same call.

    Raises:
        RankwiseError: the budget is not met within all steps, or the loss or its gradient is not finite.
    """
    sizes = [len(layer.down) for layer in layers.values()]
    logits = torch.cat([torch.linspace(FIRST_LOGIT, LAST_LOGIT, size) for size in sizes]).to(device)
    logits.requires_grad_(True)
    weight = torch.cat(
        [torch.full((size,), float(sum(layer.down.shape[1:] + layer.up.shape[:1]))) for size, layer in
         zip(sizes, layers.values(), strict=True)]
    ).to(device)  # fmt: skip
    weight /= weight.sum()
    optimiser = torch.optim.Adam([logits], lr=training.learning_rate)
    course = _restored(parts, optimiser, logits)
    while True:
        step, meets = course.step, enough(_counts(layers, logits, sizes))
        if meets:
            course.best = logits.detach().clone()
        if meets and course.met is None:
            log.info("masks: the budget is met after %d steps", step)
            course.met = step
        if step == training.steps or (course.met is not None and step == course.met + training.settle):
            break
        generator = torch.Generator().manual_seed(training.seed * training.steps + step)
        chosen = torch.randint(len(tokens), (training.batch_size,), generator=generator)
        _draw_masks(layers, logits, sizes, training.temperature, generator)
        with torch.enable_grad():
            loss = _distance(model, tokens[chosen].to(device), layers)
        pressure = 0.0 if meets else _pressure(training, step if course.met is None else course.met)
        logits.grad = _gradient(loss, logits, course) + pressure * weight
        loss = loss.detach()  # no longer holds the pass
        optimiser.step()
        course.step += 1
        if course.step % STEPS_KEPT == 0:
            log.info("masks: step %d, distance of hidden states %.3g", course.step, float(loss))
            if parts is not None:
                parts.save("masks", _state(optimiser, logits, course))
    if course.best is None:
        raise RankwiseError(
            f"masks: after {training.steps} steps they do not meet the budget yet; raise `steps`, `pressure` or "
            "`growth`"
        )
    return dict(zip(layers, torch.split(course.best.cpu(), sizes), strict=True))


def _pressure(training: MaskTraining, step: int) -> float:
    """On the mean logit, in a step.

    Raises:
        RankwiseError: it has outgrown the numbers before the budget was met.
    """
    if step * math.log1p(training.growth) > LARGEST_GROWTH:
        raise RankwiseError(
            f"masks: by step {step} the pressure has grown e^{LARGEST_GROWTH} times, and they do not meet the budget "
            "yet; lower `growth`, and raise `learning_rate` or `pressure`"
        )
    return training.pressure * (1 + training.growth) ** step


def _counts(layers: Mapping[str, Any], logits: torch.Tensor, sizes: list[int]) -> dict[str, int]:
    """How many directions of each matrix have a logit above zero."""
    parts = torch.split((logits.detach() > 0).cpu(), sizes)
    return {name: int(part.sum()) for name, part in zip(layers, parts, strict=True)}


def _draw_masks(
    layers: Mapping[str, MaskedLinear],
    logits: torch.Tensor,
    sizes: list[int],
    temperature: float,
    generator: torch.Generator,
) -> None:
    """Give every layer a mask, with a gradient to its logits."""
    uniform = torch.rand(len(logits), generator=generator).clamp(1e-6, 1 - 1e-6).to(logits.device)
    gumbel = -torch.log(-torch.log(uniform))
    with torch.enable_grad():
        soft = torch.sigmoid((logits + gumbel) / temperature)
        masks = (soft > 0.5).to(soft) + (soft - soft.detach())
        for layer, mask in zip(layers.values(), torch.split(masks, sizes), strict=True):
            layer.mask = mask.to(layer.up.device)


def _distance(model: PreTrainedModel, ids: torch.Tensor, layers: Mapping[str, MaskedLinear]) -> torch.Tensor:
    """Square errors of hidden states after the middle block and before the head, as shares of each token's size."""
    with torch.no_grad():
        right = _states(model, ids)
    with exchanged(model, layers):
        found = _states(model, ids)
    shares = [
        (one.float() - other.float()).square().sum(-1) / other.float().square().sum(-1)
        for one, other in zip(found, right, strict=True)
    ]
    return torch.stack([share.mean().to(model.device) for share in shares]).sum()


def _gradient(loss: torch.Tensor, logits: torch.Tensor, course: _Course) -> torch.Tensor:
    """Of the loss, by the logits; lowers the scale where gradients on the way overflow the model's dtype.

    Raises:
        RankwiseError: the loss is not finite, or its gradient is not at any scale.
    """
    if not math.isfinite(float(loss.detach())):
        raise RankwiseError(f"masks: the loss of step {course.step} is not finite; set `dtype: float32` for this model")
    while course.scale >= 1:
        scale = loss.new_tensor(course.scale)
        (gradient,) = torch.autograd.grad([loss], [logits], [scale], retain_graph=True)
        if bool(gradient.isfinite().all()):
            return gradient / scale
        course.scale /= 2
    raise RankwiseError(f"masks: the gradient of step {course.step} is not finite; set `dtype: float32` for this model")


def _states(model: PreTrainedModel, ids: torch.Tensor) -> list[torch.Tensor]:
    blocks: Any = model.get_submodule(family_of(model).blocks)
    caught: list[torch.Tensor] = []

    def catch(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        caught.append(output[0] if isinstance(output, tuple) else output)

    handle = blocks[(len(blocks) - 1) // 2].register_forward_hook(catch)
    try:
        caught.append(last_hidden(model, ids))
    finally:
        handle.remove()
    return caught


def _state(optimiser: torch.optim.Adam, logits: torch.Tensor, course: _Course) -> dict[str, torch.Tensor]:
    """All that the next step depends on."""
    moments = optimiser.state[logits]
    met = {} if course.met is None or course.best is None else {"met": torch.tensor([course.met]), "best": course.best}
    return met | {
        "logits": logits.detach(),
        "first": moments["exp_avg"],
        "second": moments["exp_avg_sq"],
        "step": torch.tensor([course.step]),
        "scale": torch.tensor([course.scale]),
    }


def _restored(parts: Parts | None, optimiser: torch.optim.Adam, logits: torch.Tensor) -> _Course:
    """Put a kept state back, if there is one; returns where to go on."""
    kept = parts.load("masks") if parts is not None else None
    if kept is None:
        return _Course()
    step = int(kept["step"])
    with torch.no_grad():
        logits.copy_(kept["logits"])
    moments = {name: kept[key].to(logits) for name, key in (("exp_avg", "first"), ("exp_avg_sq", "second"))}
    optimiser.state[logits] = {**moments, "step": torch.tensor(float(step))}
    log.info("masks: going on with step %d", step)
    course = _Course(step, scale=float(kept["scale"]))
    if "met" in kept:
        course.met, course.best = int(kept["met"]), kept["best"].to(logits.device)
    return course
