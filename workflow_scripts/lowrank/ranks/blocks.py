"""Blocks compared by more than predicted losses.

The predicted loss of a matrix is of the calibration text, to second order, and of one error at a time. Within a block
it says well which matrix, rank or neuron to give up. Between blocks it depends on the calibration text more than
blocks do: an order of blocks that is best there need not be best elsewhere. Block influence, how much a block turns the
residual stream, is a second opinion, which no gradient and no fit to that text went into.

With U_b what block b is predicted to lose where it keeps the same share of its parameters as the whole, and I_b its
influence, the losses of its matrices are multiplied by

    w_b = sqrt((I_b / mean I) / (U_b / mean U)),   geometric means over blocks,

so that blocks are compared by the geometric mean of both opinions. Within a block nothing changes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from lowrank.errors import RankwiseError
from lowrank.ranks.curves import Curve
from lowrank.ranks.groups import combined

LEAST_INFLUENCE = 1e-6
"""A block that turns the residual stream by less is taken to turn it by so much: one that does nothing has none."""
NOTHING = 1e-5
"""Share of a block's largest predicted loss that may be rounding: statistics are files of float32."""


def weigh_blocks(
    curves: Mapping[str, Curve], layers: Mapping[str, AbstractSet[int]], influence: Sequence[float], kept: float
) -> dict[str, Curve]:
    """The curves with their losses weighed block by block.

    A curve of several blocks, such as that of one width for all, is not weighed: it has no choice between blocks.

    Args:
        curves: of matrices and groups.
        layers: curve -> the blocks of its matrices.
        influence: of every block of the model.
        kept: share of the parameters that stay.

    Raises:
        RankwiseError: the influence of a block is no number.
    """
    of_block: dict[int, list[str]] = {}
    for name, found in layers.items():
        if len(found) == 1:
            of_block.setdefault(next(iter(found)), []).append(name)
    uniform = {layer: loss_at([curves[name] for name in names], kept) for layer, names in of_block.items()}
    weights = block_weights(uniform, influence)
    weighed = dict(curves)
    for layer, names in of_block.items():
        weighed |= {name: replace(curves[name], losses=weights[layer] * curves[name].losses) for name in names}
    return weighed


def loss_at(curves: Sequence[Curve], kept: float) -> float:
    """What the matrices of a block are predicted to lose if they keep a share of their parameters, or as near below
    as their choices allow; of the smallest choices, if all keep more. What is less than `NOTHING` of those is 0."""
    whole, _ = combined(curves)
    dense = sum(curve.parameters[-1] for curve in curves)  # `whole` ends where nothing more can be won
    fits = np.flatnonzero(whole.parameters <= kept * dense)
    lost = float(whole.losses[fits[-1] if len(fits) else 0])
    return lost if lost > NOTHING * float(whole.losses[0]) else 0.0


def block_weights(uniform: Mapping[int, float], influence: Sequence[float]) -> dict[int, float]:
    """w_b of every block of `uniform`; 1 for one that is predicted to lose nothing.

    Args:
        uniform: U_b of the blocks that have a choice, in nats.
        influence: I_b of every block of the model.

    Raises:
        RankwiseError: the influence of a block is no number.
    """
    for layer in uniform:
        if not np.isfinite(influence[layer]):
            raise RankwiseError(f"block {layer} has an influence of {influence[layer]}, which is no number")
    blocks = [layer for layer, loss in uniform.items() if loss > 0]
    if not blocks:
        return dict.fromkeys(uniform, 1.0)
    ratios = _centred([max(influence[layer], LEAST_INFLUENCE) for layer in blocks]) - _centred(
        [uniform[layer] for layer in blocks]
    )
    return dict.fromkeys(uniform, 1.0) | dict(zip(blocks, np.exp(ratios / 2).tolist(), strict=True))


def _centred(values: Sequence[float]) -> npt.NDArray[np.float64]:
    """Logarithms less their mean."""
    logs = np.log(np.array(values, dtype=np.float64))
    centred: npt.NDArray[np.float64] = logs - logs.mean()
    return centred
