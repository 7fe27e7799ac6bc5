"""FLAP (An et al., AAAI 2024): prune heads and neurons whose inputs fluctuate least, and keep their mean as a bias.

What a channel contributes to its layer is its mean, which a bias replaces exactly, and its fluctuation around it,
which is lost. So the score of an input channel j of o or down is its variance times |W_j|^2, over the whole model on
one scale: z-scores within each branch of each block. Groups are worth more than neurons, so units are counted by
their parameters when the threshold is sought. Biases that are added count against the budget.

The released code squares the scores of attention channels before it standardises them, which its paper does not say;
`square_attention` decides.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field, model_validator

from lowrank.config.base import Name, Positive, wrong
from lowrank.config.presets import Calibration, MethodSettings

if TYPE_CHECKING:
    import torch

    from lowrank.calibration.moments import Moments
    from lowrank.compression.branches import Counts, Structure
    from lowrank.compression.compress import CompressionTask
    from lowrank.model.replacements import Replacements
    from lowrank.ranks.budget import Budget


_OF_MM = "is needed by `structure: AL-MM` and `UL-MM`, and only by them"


class Settings(MethodSettings):
    """FLAP reads means and variances of the inputs of o and down."""

    reads: ClassVar[tuple[Literal["statistics", "tokens"], ...]] = ("statistics",)
    makes_pairs: ClassVar[bool] = False

    kind: Literal["flap"]
    calibration: Name
    metric: Literal["wifv", "ifv", "wifn"] = Field(
        default="wifv", description="variance x |W_j|^2; the variance alone; or mean |W_ij| x root mean square of x_j"
    )
    structure: Literal["AL-AM", "AL-MM", "UL-UM", "UL-MM"] = Field(
        default="AL-AM",
        description="AL: one threshold for all blocks, UL: each block loses the same; "
        "MM: `remove_heads` heads and the rest from neurons, else heads and neurons together",
    )
    remove_heads: Positive | None = Field(default=None, description="MM only: query heads to remove from the model")
    square_attention: bool = Field(default=True, description="square the scores of attention, as the released code")

    @classmethod
    def unread(cls, given: Mapping[str, Any]) -> dict[str, str]:
        """A number of heads goes with MM."""
        needs = given.get("structure") in ("AL-MM", "UL-MM")
        return super().unread(given) | ({} if needs else {"remove_heads": _OF_MM})

    @model_validator(mode="after")
    def _mm_needs_heads(self) -> Settings:
        if self.structure.endswith("MM") and self.remove_heads is None:
            raise wrong("remove_heads", _OF_MM)
        return self

    def misfits(self, budget: Budget, ratio: int, calibration: Calibration | None) -> Iterator[tuple[str, str]]:
        """Heads may hang together; every branch keeps some units, and heads go in whole groups."""
        from lowrank.compression.branches import Structure
        from lowrank.errors import RankwiseError

        structure, allowed = Structure.of(budget), budget.allowed(ratio)
        try:
            structure.require_separate_heads("flap")
        except RankwiseError as error:
            yield "kind", str(error)
            return
        try:
            structure.require_reach(allowed)
        except RankwiseError as error:
            yield "", str(error)
            return
        try:
            fixed_removal(self, structure, allowed)
        except RankwiseError as error:
            yield "remove_heads" if self.remove_heads else "", str(error)

    def kept_parameters(self, budget: Budget, ratio: int) -> int | None:
        """Where all blocks lose the same; else scores decide where biases are added, and which units overshoot."""
        from lowrank.compression.branches import Structure

        structure = Structure.of(budget)
        fixed = fixed_removal(self, structure, budget.allowed(ratio))
        return None if isinstance(fixed, int) else structure.remaining(fixed)


def compress(task: CompressionTask) -> Replacements:
    """Prune what fluctuates least until the budget is met.

    Raises:
        RankwiseError: a family whose heads cannot go, a ratio out of reach, or channels that cannot be told apart.
    """
    from lowrank.compression.branches import Structure
    from lowrank.compression.structured import cut, kept_units

    if task.ratio == 0:
        return {}
    structure = Structure.of(task.budget)
    structure.require_separate_heads("flap")
    scores, means = _scores_and_means(task, structure)
    removed = _removal(task, structure, scores)
    return cut(task.model, structure, kept_units(scores, removed), means)


def fixed_removal(settings: Settings, structure: Structure, allowed: float) -> Counts | int:
    """What shapes alone decide: what the branches lose where all blocks lose the same, else how many groups go.

    Args:
        settings: the preset.
        structure: of the model.
        allowed: parameters of all linear layers that may stay.

    Raises:
        RankwiseError: `remove_heads` is no whole number of groups, or the neurons cannot make up for it.
    """
    from lowrank.compression.branches import even_removal
    from lowrank.errors import RankwiseError

    local = settings.structure.startswith("UL")
    if settings.remove_heads is None:
        return even_removal(structure, allowed) if local else 0
    layers, attention = structure.budget.dimensions.layers, structure.attention
    step = structure.heads_per_group * (layers if local else 1)
    groups, rest = divmod(settings.remove_heads, step)
    if rest:
        raise RankwiseError(
            f"flap: `remove_heads: {settings.remove_heads}` must be a multiple of {step}: query heads go together with "
            f"the key/value head that they share{', and from every block the same' if local else ''}"
        )
    whole = groups * (layers if local else 1)
    if whole > layers * attention.most:
        raise RankwiseError(
            f"flap: `remove_heads: {settings.remove_heads}` is more than the "
            f"{layers * attention.most * structure.heads_per_group} that can go; every block keeps a group"
        )
    dense = structure.budget.dense_parameters
    removed = 100 * (1 - allowed / dense)
    if attention.cost * whole > dense - allowed:
        raise RankwiseError(
            f"flap: `remove_heads: {settings.remove_heads}` alone removes more than {removed:.3g} %; remove fewer heads"
        )
    if local:
        return even_removal(structure, allowed, groups=groups)
    neurons: Counts = {place: branch.most for place, branch in structure.places() if branch is structure.mlp}
    if structure.remaining(neurons) - groups * attention.cost > allowed:
        raise RankwiseError(
            f"flap: removing {removed:.3g} % is out of reach: with `remove_heads: "
            f"{settings.remove_heads}` even all neurons that can go are too few; remove more heads, or less"
        )
    return groups


def _removal(task: CompressionTask, structure: Structure, scores: dict[tuple[int, str], torch.Tensor]) -> Counts:
    """How many units each branch loses."""
    from lowrank.compression.structured import lowest_removal, lowest_units

    allowed = task.budget.allowed(task.ratio)
    fixed = fixed_removal(task.settings, structure, allowed)
    if not isinstance(fixed, int):
        return fixed
    if task.settings.remove_heads is None:
        return lowest_removal(structure, scores, allowed)
    neurons = {place: values for place, values in scores.items() if place[1] == structure.mlp.name}
    attention = {place: values for place, values in scores.items() if place not in neurons}
    return lowest_removal(structure, neurons, allowed, lowest_units(structure, attention, fixed))


def _scores_and_means(
    task: CompressionTask, structure: Structure
) -> tuple[dict[tuple[int, str], torch.Tensor], dict[tuple[int, str], torch.Tensor]]:
    """Branch -> the score of each unit: the mean over its channels of their z-scores; and the mean of each channel."""
    scores, means = {}, {}
    statistics = task.required_statistics()
    for layer in range(task.budget.dimensions.layers):
        moments = statistics.of(layer)
        for place, branch in structure.places([layer]):
            name = structure.layer_name(layer, branch.reader)
            inputs = moments[branch.reader.site]
            values = _channel_scores(task.model.get_submodule(name).weight, inputs, task.settings.metric)
            if task.settings.square_attention and branch is structure.attention:
                values = values**2
            scores[place] = standardised(values, name).view(branch.units, -1).mean(dim=1)
            means[place] = inputs.mean
    return scores, means


def _channel_scores(weight: torch.Tensor, inputs: Moments, metric: str) -> torch.Tensor:
    """One score per input channel of a layer, n in float64.

    wifv: Var(x_j) sum_i W_ij^2. ifv: Var(x_j). wifn: mean_i |W_ij| sqrt(E x_j^2).
    """
    within, window_means = inputs.within.diagonal().double(), inputs.window_means.double()
    wide = weight.detach().cpu().double()
    if metric == "wifn":
        values: torch.Tensor = wide.abs().mean(dim=0) * (within + (window_means**2).mean(dim=0)).sqrt()
        return values
    variance = within + ((window_means - inputs.mean) ** 2).mean(dim=0)
    variance = variance * (inputs.tokens / max(1, inputs.tokens - 1))
    return variance if metric == "ifv" else variance * (wide**2).sum(dim=0)


def standardised(values: torch.Tensor, where: str) -> torch.Tensor:
    """Values less their mean, over their standard deviation.

    Raises:
        RankwiseError: all are the same, so no channel is better than another; `where` names the layer.
    """
    from lowrank.errors import RankwiseError

    deviation = values.std()
    if not bool(deviation > 0):
        raise RankwiseError(
            f"{where}: its input channels all fluctuate alike (score {float(values[0]):.3g}), so none can be chosen. "
            "Look at the calibration text: is it more than one repeated token?"
        )
    return (values - values.mean()) / deviation
