"""LLM-Pruner (Ma et al., NeurIPS 2023): prune the heads and neurons with the least estimated change of the loss.

Blocks in the middle lose the same share of heads and neurons each; the first and last blocks, on which the rest
depends most, stay whole. The loss is that of a few short calibration windows. A unit's importance is the sum over all
its rows and columns; nothing makes up for what is cut. With W a weight, g the gradient of the mean loss and F the mean
of the squares of the gradients of single windows, a row or column counts

    param_first: sum |W g|      param_second: sum W^2 F     param_mix: sum |W g - W^2 F / 2|
    vectorize:   |sum W g|      l1: sum |W|                 l2: sum W^2

(the paper's tables use `param_first`, there "Element^1"). Units are kv groups and neurons, so grouped queries stay
with the key/value head that they share.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from lowrank.config.base import AtLeastTwo, Name, NotNegative, Positive, Share
from lowrank.config.presets import Calibration, MethodSettings, Reads

if TYPE_CHECKING:
    import torch

    from lowrank.compression.branches import Counts, Structure
    from lowrank.compression.compress import CompressionTask
    from lowrank.model.replacements import Replacements
    from lowrank.ranks.budget import Budget

_NEEDS_GRADIENT = ("param_first", "param_mix", "vectorize")
_NEEDS_SQUARES = ("param_second", "param_mix")
_WITHOUT_GRADIENTS = ("l1", "l2", "random")


class Settings(MethodSettings):
    """LLM-Pruner reads calibration windows, to take gradients on."""

    reads: ClassVar[Reads] = ("tokens",)
    makes_pairs: ClassVar[bool] = False
    beside_ratio: ClassVar[str] = "own_ratio"

    kind: Literal["llm-pruner"]
    calibration: Name
    importance: Literal["param_first", "param_second", "param_mix", "vectorize", "l1", "l2", "random"] = "param_first"
    sequences: Positive = Field(default=10, description="first windows of the calibration that are used")
    length: AtLeastTwo = Field(default=64, description="first tokens of each that are used")
    skip_first: NotNegative = Field(default=4, description="blocks at the beginning that stay whole")
    skip_last: NotNegative = Field(
        default=2, description="blocks at the end that stay whole (released: 2 of 32 for 7B, 4 of 40 for 13B)"
    )
    own_ratio: Share | None = Field(
        default=None,
        description="share of heads and neurons that each pruned block loses, rounded as the released code does, "
        "whatever that is of the whole; null: what meets the row's ratio",
    )

    @classmethod
    def unread(cls, given: Mapping[str, Any]) -> dict[str, str]:
        """Windows are for gradients."""
        reasons, importance = super().unread(given), given.get("importance")
        if importance in _WITHOUT_GRADIENTS:
            reason = f"says nothing to `importance: {importance}`, which reads no windows; leave it out"
            reasons |= dict.fromkeys(("sequences", "length"), reason)
        return reasons

    @property
    def needs(self) -> Reads:
        """Windows are for gradients."""
        return () if self.importance in _WITHOUT_GRADIENTS else self.reads

    @property
    def is_random(self) -> bool:
        """A random importance is drawn from the seed."""
        return super().is_random or self.importance == "random"

    def misfits(self, budget: Budget, ratio: int, calibration: Calibration | None) -> Iterator[tuple[str, str]]:
        """Heads that hang together, too many blocks that stay whole, or too few windows of calibration."""
        from lowrank.compression.branches import Structure
        from lowrank.errors import RankwiseError

        if calibration and self.needs and (why := self.too_few(calibration.windows, calibration.length)):
            yield "sequences", why
        try:
            Structure.of(budget).require_separate_heads("llm-pruner")
        except RankwiseError as error:
            yield "kind", str(error)
            return
        try:
            pruned_blocks(self, budget.dimensions.layers)
        except RankwiseError as error:
            yield "skip_first", str(error)
            return
        try:
            removal(Structure.of(replace(budget, adds_bias=False)), self, budget.allowed(ratio))
        except RankwiseError as error:
            whole = f" (`skip_first: {self.skip_first}`, `skip_last: {self.skip_last}`)"
            yield ("", f"{error}{whole}") if self.own_ratio is None else ("own_ratio", str(error))

    def kept_parameters(self, budget: Budget, ratio: int) -> int | None:
        """Which units go is a matter of their importance, how many is not."""
        from lowrank.compression.branches import Structure

        structure = Structure.of(replace(budget, adds_bias=False))
        return structure.remaining(removal(structure, self, budget.allowed(ratio)))

    def too_few(self, windows: int, length: int) -> str | None:
        """Why a calibration of so many windows of so many tokens is too small, or None."""
        if windows >= self.sequences and length >= self.length:
            return None
        return (
            f"`sequences: {self.sequences}` of `length: {self.length}` are more than the calibration "
            f"'{self.calibration}' has ({windows} of {length} tokens); calibrate on more, or take fewer"
        )


def compress(task: CompressionTask) -> Replacements:
    """Prune the least important units of each block between the first and the last ones.

    Raises:
        RankwiseError: a family whose heads cannot go, no block is left to prune, the ratio is out of reach, the
            calibration is too small, or a gradient is not finite.
    """
    from lowrank.compression.branches import Structure
    from lowrank.compression.structured import cut, kept_units

    if task.ratio == 0:
        return {}
    structure = Structure.of(replace(task.budget, adds_bias=False))
    structure.require_separate_heads("llm-pruner")
    removed = removal(structure, task.settings, task.budget.allowed(task.ratio))
    scores = _importance(task, structure, [place for place, count in removed.items() if count])
    return cut(task.model, structure, kept_units(scores, removed))


def pruned_blocks(settings: Settings, layers: int) -> range:
    """The blocks that lose units.

    Raises:
        RankwiseError: none is left.
    """
    from lowrank.errors import RankwiseError

    blocks = range(settings.skip_first, layers - settings.skip_last)
    if not blocks:
        raise RankwiseError(
            f"llm-pruner: `skip_first: {settings.skip_first}` and `skip_last: {settings.skip_last}` leave none of "
            f"{layers} blocks to prune; lower them"
        )
    return blocks


def removal(structure: Structure, settings: Settings, allowed: float) -> Counts:
    """How many units each branch loses, from shapes alone.

    With `own_ratio` p a branch whose first layer has n rows loses n - int(n (1 - p)) of them, in whole units.
    """
    from lowrank.compression.branches import even_removal
    from lowrank.errors import RankwiseError

    blocks = pruned_blocks(settings, structure.budget.dimensions.layers)
    if settings.own_ratio is None:
        return even_removal(structure, allowed, blocks)
    counts: Counts = {}
    for place, branch in structure.places(blocks):
        width = structure.budget.dimensions.head_dim if branch is structure.attention else 1
        rows = branch.units * width
        counts[place] = (rows - int(rows * (1 - settings.own_ratio))) // width
        if counts[place] > branch.most:
            raise RankwiseError(
                f"llm-pruner: `own_ratio: {settings.own_ratio}` leaves {branch.units - counts[place]} of "
                f"{branch.units} units of the {branch.name} branch; at least {branch.least} must stay"
            )
    return counts


def _importance(
    task: CompressionTask, structure: Structure, places: list[tuple[int, str]]
) -> dict[tuple[int, str], torch.Tensor]:
    """Branch -> importance of each unit."""
    import torch

    kind = task.settings.importance
    if kind == "random":
        generator = torch.Generator().manual_seed(task.seed)
        return {place: torch.rand(structure.branch(place).units, generator=generator) for place in places}
    members = {place: (*structure.branch(place).writers, structure.branch(place).reader) for place in places}
    names = [structure.layer_name(place[0], linear) for place in places for linear in members[place]]
    gradients = _gradients(task, names) if kind in _NEEDS_GRADIENT else {}
    squares = _gradients(task, names, squared=True) if kind in _NEEDS_SQUARES else {}
    scores = {}
    for place in places:
        branch = structure.branch(place)
        by_type = {}
        for linear in members[place]:
            name = structure.layer_name(place[0], linear)
            weight = task.model.get_submodule(name).weight.detach().cpu().float()
            axis = 0 if linear is branch.reader else 1
            by_type[linear.name] = channel_importance(weight, gradients.get(name), squares.get(name), kind, axis)
        scores[place] = branch.per_unit(by_type)
    return scores


def _gradients(task: CompressionTask, names: list[str], squared: bool = False) -> dict[str, torch.Tensor]:
    """The gradient of the mean loss, or the mean of the squares of the gradients of single windows.

    Raises:
        RankwiseError: the calibration has fewer or shorter windows than the preset wants.
    """
    from lowrank.calibration.gradients import sum_gradients
    from lowrank.errors import RankwiseError
    from lowrank.model.devices import pick_devices

    tokens, settings = task.required_tokens(), task.settings
    if why := settings.too_few(*tokens.shape):
        raise RankwiseError(f"llm-pruner: {why}")
    tokens = tokens[: settings.sequences, : settings.length]
    sums = sum_gradients(task.model, tokens, names, pick_devices(), squared=squared)
    return {name: total.div_(len(tokens)) for name, total in sums.items()}


def channel_importance(
    weight: torch.Tensor, gradient: torch.Tensor | None, squares: torch.Tensor | None, kind: str, axis: int
) -> torch.Tensor:
    """The importance of each row (`axis` 1, summed over the columns) or column (0) of a layer.

    Args:
        weight: W, m x n.
        gradient: g, for the kinds that it enters.
        squares: F, for the kinds that it enters.
        kind: as in the presets.
        axis: that is summed over.
    """
    if kind in ("l1", "l2"):
        return weight.abs().pow(int(kind[1])).sum(dim=axis)
    change = weight * gradient if gradient is not None else weight.new_zeros(weight.shape)
    if squares is not None:
        change = change - weight**2 * squares * (0.5 if kind == "param_mix" else 1.0)
    return change.sum(dim=axis).abs() if kind == "vectorize" else change.abs().sum(dim=axis)
