"""Ranks by predicted loss: one multiplier over all matrices of a model, no search and no groups of layers.

Each matrix chooses among dense and the multiples of 8. A rank costs parameters, and loses half the sum of the
eigenvalues it leaves out (`bases.fisher`). Matrices may also choose together, as those of an MLP do that lose the same
neurons: such a group has a list of what it may become, with parameters and losses of its own. Minimising the sum of
losses under a budget of parameters is a multiple choice knapsack; its Lagrangian relaxation splits into one choice a
matrix or group, and with the right multiplier it is exact on the convex hulls of their curves. What the rounding of
that solution leaves of the budget goes, step by step, to the matrix or group that gains most for a parameter.

Predictions are made on the calibration text, and tell matrices of one block apart better than blocks. So whole blocks
may also be compared by how much they do (`ranks.blocks`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from lowrank.errors import RankwiseError
from lowrank.ranks.blocks import weigh_blocks
from lowrank.ranks.budget import ALIGNMENT, Budget, Ranks
from lowrank.ranks.curves import Curve, Group, choices_of

MEANING = "second order, on the calibration text"
"""What a predicted rise of the loss is; that of many matrices at once, on other text, was measured to be larger."""
Losses = Mapping[str, npt.NDArray[np.float64]]
_BISECTIONS = 200
"""At most: where next to no multiplier is needed, numbers halve more than a thousand times."""


@dataclass(frozen=True)
class PredictedAllocation:
    """Ranks, and the sum of the losses that they are predicted to cost, in nats per token (see `MEANING`).

    Attributes:
        ranks: module -> rank; None for dense, and for the modules of groups.
        loss: of everything, groups included.
        picked: group -> index of its choice.
    """

    ranks: Ranks
    loss: float
    picked: dict[str, int]


def allocate(
    budget: Budget,
    ratio: int,
    losses: Losses,
    uncompressed: Sequence[str] = (),
    groups: Mapping[str, Group] | None = None,
    influence: Sequence[float] | None = None,
) -> PredictedAllocation:
    """Choose all ranks of a model, and what its groups become.

    Args:
        budget: of the model, with the form of the pairs (`identity_block`, `adds_bias`).
        ratio: percent of the linear layers' parameters to remove; 0 leaves all of them dense.
        losses: module -> predicted loss of leaving out each direction, in the order in which ranks grow.
        uncompressed: types that stay dense.
        groups: name (that is no module's) -> what some matrices may become together; none of an uncompressed type.
        influence: of each block, by which blocks are compared as well (`ranks.blocks`); None: by their losses alone.

    Raises:
        RankwiseError: an influence that is no number, smallest choices that exceed the budget, or an unknown type.
    """
    budget.types(uncompressed)
    groups = dict(groups or {})
    ranks: Ranks = {module.name: None for module in budget.modules}
    if not ratio:
        return PredictedAllocation(ranks, 0.0, {name: len(group.losses) - 1 for name, group in groups.items()})
    together = {name for group in groups.values() for name in group.modules}
    alone = [module for module in budget.modules if module.name not in together]
    may_shrink = {module.name for module in budget.free(uncompressed)}
    free = [module for module in alone if module.name in may_shrink]
    choices = {module.name: choices_of(budget, module, losses[module.name]) for module in free}
    curves: dict[str, Curve] = {**choices, **groups}
    fixed = sum(module.parameters for module in alone if module.name not in may_shrink)
    allowed = budget.allowed(ratio) - fixed
    least = sum(float(curve.parameters[0]) for curve in curves.values())
    if least > allowed:
        stays = 100 * (least + fixed) / budget.dense_parameters
        smallest = f"ranks of at least {ALIGNMENT}" + (" and the fewest neurons that may stay" if groups else "")
        raise RankwiseError(
            f"removing {ratio} % is impossible: with {', '.join(uncompressed) or 'nothing'} dense and {smallest}, "
            f"{stays:.1f} % stays. Compress more types, or remove less.{budget.left_dense_why}"
        )
    compared = curves
    if influence is not None:
        layer_of = {module.name: module.layer for module in budget.modules}
        layers = {name: {layer_of[name]} for name in choices}
        layers |= {name: {layer_of[module] for module in group.modules} for name, group in groups.items()}
        compared = weigh_blocks(curves, layers, influence, kept=1 - ratio / 100)
    picked = _spend_rest(compared, _by_multiplier(compared, allowed), allowed)
    ranks |= {name: choice.ranks[picked[name]] for name, choice in choices.items()}
    loss = sum(float(curves[name].losses[index]) for name, index in picked.items())
    return PredictedAllocation(ranks, loss, {name: picked[name] for name in groups})


def _by_multiplier(choices: Mapping[str, Curve], allowed: float) -> dict[str, int]:
    """The choices that minimise loss + multiplier x parameters, for the smallest multiplier that meets the budget."""

    def pick(multiplier: float) -> dict[str, int]:
        return {name: int(np.argmin(c.losses + multiplier * c.parameters)) for name, c in choices.items()}

    def fits(picked: Mapping[str, int]) -> bool:
        return sum(float(choices[name].parameters[index]) for name, index in picked.items()) <= allowed

    low, high = 0.0, 1.0
    while not fits(pick(high)):
        high *= 16
    for _ in range(_BISECTIONS):
        if not low < (middle := (low + high) / 2) < high:
            break
        low, high = (low, middle) if fits(pick(middle)) else (middle, high)
    return pick(high)


def _spend_rest(choices: Mapping[str, Curve], picked: dict[str, int], allowed: float) -> dict[str, int]:
    """Raise choices while the budget lasts, each time where a parameter gains most; to any larger one, or to dense."""
    picked = dict(picked)
    spent = sum(float(choices[name].parameters[index]) for name, index in picked.items())
    while True:
        best: tuple[float, str, int] | None = None
        for name, choice in choices.items():
            now = picked[name]
            extra = choice.parameters[now + 1 :] - choice.parameters[now]
            gain = (choice.losses[now] - choice.losses[now + 1 :]) / extra
            gain[(extra > allowed - spent) | (gain <= 0)] = -1.0
            if len(gain) and float(gain.max()) > 0 and (best is None or float(gain.max()) > best[0]):
                best = (float(gain.max()), name, now + 1 + int(gain.argmax()))
        if best is None:
            return picked
        _, name, index = best
        spent += float(choices[name].parameters[index] - choices[name].parameters[picked[name]])
        picked[name] = index
