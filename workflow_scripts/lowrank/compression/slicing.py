"""How wide the residual stream of a sliced model is at each place, and what that costs (SliceGPT).

The stream has 2 L + 1 places in a model of L blocks: place 2 l is where block l is entered, place 2 l + 1 lies between
its attention and its MLP, and the last is where the last block is left. The first and the last keep all d channels in
their own basis, since embeddings, final norm and head stay as they are; each residual connection in between is a
matrix from the basis of one place to that of the next, and counts as parameters.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from itertools import pairwise

from lowrank.config.sources import ModelShape
from lowrank.errors import RankwiseError
from lowrank.model.families import FAMILIES, LinearModule
from lowrank.ranks.budget import ALIGNMENT, Budget

Widths = tuple[int, ...]
"""Channels of the stream at each of its 2 L + 1 places."""

READS = {"attention": 0, "mlp": 1}
"""Input site -> how many places behind its block's first the stream is read."""

WRITES = {"attention_output": 1, "mlp_output": 2}
"""Input site -> how many places behind its block's first a layer of that site writes to the stream."""


def require_plain_branches(family: str) -> None:
    """See that the residual stream of a family can be rotated.

    Raises:
        RankwiseError: its branches do not read it through one root mean square norm and write straight to it.
    """
    if FAMILIES[family].plain_branches:
        return
    why = (
        "LayerNorm would have to be centred in the stream"
        if FAMILIES[family].layer_norm
        else "the gains of norms behind a branch belong to the channels of the stream's own basis"
    )
    raise RankwiseError(
        f"slicegpt: the residual stream of family '{family}' cannot be rotated: {why}; take another method for this "
        "model"
    )


def sliced_size(module: LinearModule, widths: Widths) -> int:
    """Weights of a linear layer whose side that faces the stream has as many channels as the stream has there."""
    if module.type.site in READS:
        return module.out_features * widths[2 * module.layer + READS[module.type.site]]
    return module.in_features * widths[2 * module.layer + WRITES[module.type.site]]


def sliced_parameters(budget: Budget, widths: Widths) -> int:
    """Weights of all linear layers and of the matrices in the residual connections."""
    linears = sum(sliced_size(module, widths) for module in budget.modules)
    return linears + sum(before * after for before, after in pairwise(widths))


def widths_within(budget: Budget, ratio: int) -> Widths:
    """The widest stream whose parameters, shortcuts counted, meet a budget.

    All places between the first and the last get the same multiple of 8, and as many of the latest as the budget
    allows 8 more: what every block adds makes the stream's rank grow with depth. No budget is exceeded, and none missed
    by the cost of 8 channels at one place.

    Raises:
        RankwiseError: even 8 channels exceed the budget.
    """
    hidden, free = budget.dimensions.hidden, 2 * budget.dimensions.layers - 1

    def at(step: int) -> Widths:
        base, wider = divmod(step, free)
        inner = [ALIGNMENT * (base + 1 + (place >= free - wider)) for place in range(free)]
        return (hidden, *(min(width, hidden) for width in inner), hidden)

    steps = range(free * -(-hidden // ALIGNMENT))
    fitting = bisect_right(steps, budget.allowed(ratio), key=lambda step: sliced_parameters(budget, at(step)))
    if not fitting:
        least = 100 * sliced_parameters(budget, at(0)) / budget.dense_parameters
        raise RankwiseError(
            f"SliceGPT cannot remove {ratio} %: the first layers read and the last one writes the stream at its full "
            f"width, and with {ALIGNMENT} channels everywhere else {least:.1f} % stays; remove less"
        )
    return at(fitting - 1)


def widths_of_slice(hidden: int, layers: int, share: float) -> Widths:
    """The stream when a share of its channels is cut, as SliceGPT's authors give it: 8 floor((1 - s) d / 8) everywhere.

    Raises:
        RankwiseError: nothing is left.
    """
    width = ALIGNMENT * int((1 - share) * hidden / ALIGNMENT + 1e-9)
    if not width:
        raise RankwiseError(f"`slice: {share:g}` leaves fewer than {ALIGNMENT} of {hidden} channels; cut less")
    return (hidden, *[width] * (2 * layers - 1), hidden)


def reference_total(shape: ModelShape, width: int) -> int:
    """Parameters of a whole model in the layout of SliceGPT's authors, to compare the sizes that they report.

    There the embeddings are cut to the stream's width too, the last block is left at full width and the head, which is
    never tied, reads all channels. Norms have no gains; biases are left out.
    """
    budget = Budget.of(shape)
    widths = (*[width] * (2 * shape.layers), shape.hidden)
    return sliced_parameters(budget, widths) + shape.vocabulary * (width + shape.hidden)


def describe_widths(widths: Widths) -> str:
    """`3272`, or `2936 to 2944`: the widths between the first and the last place."""
    inner: Sequence[int] = sorted(set(widths[1:-1]))
    return f"{inner[0]}" if len(inner) == 1 else f"{inner[0]} to {inner[-1]}"
