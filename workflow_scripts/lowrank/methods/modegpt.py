"""MoDeGPT (Lin et al., ICLR 2025): narrower MLPs and heads, each pair of neighbouring matrices with one decomposition.

- `mlp`: of the neurons those with the largest ridge leverage scores stay, diag(C (C + lambda I)^-1) with C = E[h h'] of
  what the last matrix reads; W becomes W C_:K C_KK^-1 (Nystroem), that is the regression on those that stay.
- `qk`: of the dimensions in which queries and keys are multiplied those with the largest products of sizes, by rotary
  pairs and by groups of heads (`compression.heads`).
- `vo`: v and o of a group of heads meet in fewer dimensions, by an SVD of their product in the metric of E[x x'].

All parts of a block lose the same share. The shares follow from block influence, softmax(-BI / temperature) over the
blocks: what turns the residual stream less loses more.

Beyond the paper: shares are scaled so that the whole meets the row's ratio, and widths are multiples of `multiple`.
Heads that share a key and value keep the same rotary pairs, and their v is decomposed with the o of all of them.
Inputs are not centred and no bias is added, but biases that are there count, as parts of what q, k and v put out. Where
q and k are normed (Qwen3, OLMo 2, Gemma 3), `qk` is not defined.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field

from lowrank.config.base import Distinct, Name, Number, Positive, Share
from lowrank.config.presets import Calibration, MethodSettings, Reads
from lowrank.ranks.budget import ALIGNMENT

if TYPE_CHECKING:
    import torch

    from lowrank.calibration.moments import Moments
    from lowrank.compression.compress import CompressionTask
    from lowrank.compression.heads import Inputs
    from lowrank.compression.widths import Steps, Widths
    from lowrank.model.replacements import Replacement, Replacements, SmallerLinear
    from lowrank.ranks.budget import Budget

log = logging.getLogger(__name__)


class Settings(MethodSettings):
    """MoDeGPT reads second moments of inputs, and runs the model once on its calibration windows."""

    reads: ClassVar[Reads] = ("statistics", "tokens")
    makes_pairs: ClassVar[bool] = False

    kind: Literal["modegpt"]
    calibration: Name
    parts: Distinct[Literal["mlp", "qk", "vo"]] = Field(
        default=["mlp", "qk", "vo"],
        min_length=1,
        description="what gets narrower; mlp: neurons; qk: dimensions of q and k, by rotary pairs; vo: dimensions of v "
        "and o",
    )
    temperature: Annotated[Number, Field(ge=0.01)] = Field(
        default=0.1, description="of the softmax over blocks; the larger, the more alike are the shares that they lose"
    )
    most: Share = Field(default=0.8, description="largest share that a block loses")
    ridge: Annotated[Number, Field(gt=0)] = Field(
        default=0.01, description="lambda of the leverage scores, as a share of the mean of C's diagonal"
    )
    damping: Share = Field(
        default=1e-4, description="share of each neuron's own second moment that is added to it before C_KK is inverted"
    )
    multiple: Positive = Field(default=ALIGNMENT, description="widths are multiples of it")

    @classmethod
    def unread(cls, given: Mapping[str, Any]) -> dict[str, str]:
        """Two numbers are about neurons."""
        parts = given.get("parts", ["mlp"])
        if not isinstance(parts, list) or "mlp" in parts:
            return super().unread(given)
        return super().unread(given) | dict.fromkeys(("ridge", "damping"), "is about neurons, and `parts` has no mlp")

    def misfits(self, budget: Budget, ratio: int, calibration: Calibration | None) -> Iterator[tuple[str, str]]:
        """Norms of whole heads, multiples that leave no choice, and ratios out of reach."""
        from lowrank.errors import RankwiseError

        wrong = list(undefined(self, budget))
        yield from wrong
        try:
            if not wrong:
                steps_of(self, budget).require_reach(self.most, ratio)
        except RankwiseError as error:
            yield "", str(error)


def compress(task: CompressionTask) -> Replacements:
    """Choose the widths of all blocks; each block is decomposed when it is asked for.

    Raises:
        RankwiseError: a part that is not defined for the family, a ratio out of reach, or damaged statistics; named.
    """
    from lowrank.compression.influence import block_influence
    from lowrank.model.devices import pick_devices
    from lowrank.model.replacements import Deferred
    from lowrank.model.runtime import pick_device

    if task.ratio == 0:
        return {}
    settings, device = task.settings, pick_device()
    steps = steps_of(settings, task.budget)
    influence = block_influence(task.model, task.required_tokens(), pick_devices())
    blocks = steps.blocks(shares_of(influence, settings.temperature), settings.most, task.ratio)
    _tell(task, influence, blocks)

    def narrower(layer: int) -> dict[str, Replacement]:
        made = Block(task, layer, device).narrower(blocks[layer])
        log.info("decomposed block %d of %d", layer + 1, len(blocks))
        return made

    groups = [(layer, Block(task, layer, device).changed(widths)) for layer, widths in enumerate(blocks)]
    return Deferred.of_groups(groups, narrower)


def undefined(settings: Settings, budget: Budget) -> Iterator[tuple[str, str]]:
    """What of a preset is not defined for a model: a key, and what to do about it."""
    from lowrank.compression.widths import Steps
    from lowrank.model.families import FAMILIES

    steps, family = Steps(budget, tuple(settings.parts), settings.multiple), FAMILIES[budget.dimensions.family]
    if family.normed != "nothing" and "qk" in settings.parts:
        others = ", ".join(part for part in settings.parts if part != "qk") or "mlp, vo"
        over = "head by head" if family.normed == "heads" else "as wholes"
        yield (
            "parts",
            f"family '{family.model_type}' norms q and k {over}, each dimension by all of them, so none can go; "
            f"leave `qk` out (`parts: [{others}]`)",
        )
    if family.rotary == "part" and "qk" in settings.parts:
        yield (
            "parts",
            f"models of family '{family.model_type}' may rotate only a part of each head, which the shape does not "
            "tell; leave `qk` out (`parts: [mlp, vo]`)",
        )
    stuck = [part for part in settings.parts if steps.step(part) >= steps.full(part)]
    if stuck:
        step, full = steps.step(stuck[0]), steps.full(stuck[0])
        yield "multiple", f"steps of {step} leave no choice to `{stuck[0]}`, whose width is {full}; take a smaller one"


def steps_of(settings: Settings, budget: Budget) -> Steps:
    """Which widths the blocks of a model may have.

    Raises:
        RankwiseError: what `undefined` says.
    """
    from lowrank.compression.widths import Steps
    from lowrank.errors import RankwiseError

    for key, reason in undefined(settings, budget):
        raise RankwiseError(f"modegpt: `{key}`: {reason}")
    return Steps(budget, tuple(settings.parts), settings.multiple)


def shares_of(influence: list[float], temperature: float) -> list[float]:
    """softmax(-BI / temperature): what the blocks lose is in proportion."""
    from math import exp

    least = min(influence)
    weights = [exp((least - each) / temperature) for each in influence]
    return [weight / sum(weights) for weight in weights]


class Block:
    """One block of the dense model, with the second moments of what its layers read, in float64."""

    def __init__(self, task: CompressionTask, layer: int, device: torch.device) -> None:
        from lowrank.compression.branches import Structure
        from lowrank.model.families import FAMILIES

        self._task, self._layer_number, self._device = task, layer, device
        self._structure = Structure.of(task.budget)
        family = FAMILIES[task.budget.dimensions.family]
        self._rotary = bool(family.rotary)
        self._where = f"{family.blocks}.{layer}"
        self._names = {linear.name: self._structure.layer_name(layer, linear) for linear in family.types}

    def changed(self, widths: Widths) -> list[str]:
        """The names of what does not stay as it is."""
        from lowrank.compression.widths import Widths

        dense, branch = Widths.dense(self._task.budget.dimensions), self._structure.mlp
        types = [linear.name for linear in (*branch.writers, branch.reader)] if widths.mlp < dense.mlp else []
        types += ["q", "k"] if widths.qk < dense.qk else []
        types += ["v", "o"] if widths.vo < dense.vo else []
        attention = [self._attention] if (widths.qk, widths.vo) != (dense.qk, dense.vo) else []
        return [self._names[name] for name in types] + attention

    def narrower(self, widths: Widths) -> dict[str, Replacement]:
        """The layers of what does not stay as it is."""
        from lowrank.compression.widths import Widths
        from lowrank.model.replacements import NarrowedHeads

        shape, dense = self._task.budget.dimensions, Widths.dense(self._task.budget.dimensions)
        found: dict[str, SmallerLinear] = {}
        if widths.mlp < dense.mlp:
            found |= self._mlp(widths.mlp)
        pairs = None
        if widths.qk < dense.qk:
            layers, pairs = self._query_key(widths.qk)
            found |= layers
        if widths.vo < dense.vo:
            found |= self._value_output(widths.vo)
        changed: dict[str, Replacement] = {name: layer.stored(self._task.model.dtype) for name, layer in found.items()}
        if (widths.qk, widths.vo) != (dense.qk, dense.vo):
            changed[self._attention] = NarrowedHeads(shape.heads, shape.kv_heads, pairs)
        return changed

    def _mlp(self, count: int) -> dict[str, SmallerLinear]:
        """Of the first matrices the rows that stay, and the last one refitted to them."""
        from lowrank.compression.neurons import Neurons
        from lowrank.model.replacements import SmallerLinear

        branch, settings = self._structure.mlp, self._task.settings
        name, second = self._names[branch.reader.name], self._second(branch.reader.site)
        reader = self._layer(branch.reader.name)
        weight = reader.weight.detach().to(self._device)
        neurons = Neurons.of(weight, reader.bias, second, None, None, 0, name, settings.damping)
        scores = leverage_scores(second, settings.ridge, name)
        kept = scores.sort(descending=True, stable=True).indices[:count].sort().values
        found = {name: SmallerLinear(*neurons.refit(kept))}
        for linear in branch.writers:
            found[self._names[linear.name]] = SmallerLinear.of_rows(self._layer(linear.name), kept)
        return found

    def _query_key(self, width: int) -> tuple[dict[str, SmallerLinear], torch.Tensor | None]:
        """q and k, and the rotary pairs that they have left, if there are any."""
        from lowrank.compression.heads import QueryKey

        groups = self._task.budget.dimensions.kv_heads
        block = QueryKey.of(self._layer("q"), self._layer("k"), groups, self._read, self._rotary, self._where)
        kept = block.kept(width // 2 if self._rotary else width)
        layers = dict(zip((self._names["q"], self._names["k"]), block.narrower(kept), strict=True))
        return layers, kept if self._rotary else None

    def _value_output(self, width: int) -> dict[str, SmallerLinear]:
        """v and o."""
        from lowrank.compression.heads import ValueOutput

        groups = self._task.budget.dimensions.kv_heads
        block = ValueOutput.of(self._layer("v"), self._layer("o"), groups, self._read, self._where)
        return dict(zip((self._names["v"], self._names["o"]), block.narrower(width), strict=True))

    @property
    def _attention(self) -> str:
        return self._names["q"].rpartition(".")[0]

    @cached_property
    def _moments(self) -> dict[str, Moments]:
        return self._task.required_statistics().of(self._layer_number)

    @cached_property
    def _read(self) -> Inputs:
        """What q, k and v read."""
        from lowrank.compression.heads import Inputs

        return Inputs(self._second("attention"), self._moments["attention"].mean.to(self._device))

    def _layer(self, name: str) -> Any:
        return self._task.model.get_submodule(self._names[name])

    def _second(self, site: str) -> torch.Tensor:
        """E[x x'] of what a site reads."""
        from lowrank.config.presets import Covariance

        moments: Moments = self._moments[site]
        return moments.estimate(Covariance(estimator="uncentred"))[0].to(self._device)


def leverage_scores(second: torch.Tensor, ridge: float, where: str) -> torch.Tensor:
    """diag(C (C + lambda I)^-1), f in float64, with lambda a share of the mean of C's diagonal; 0 where all is zero.

    That one huge neuron makes all others look alike is the method as published (`bases.damping` has what we do).

    Args:
        second: C, f x f.
        ridge: that share.
        where: the layer's name, for errors.

    Raises:
        RankwiseError: rounding has left C less positive than the share makes up for; the layer is named.
    """
    import torch

    from lowrank.errors import RankwiseError

    mean = second.diagonal().mean()
    if not bool(mean > 0):
        return torch.zeros_like(second.diagonal())
    damped = second / mean + ridge * torch.eye(len(second), dtype=second.dtype, device=second.device)
    root, info = torch.linalg.cholesky_ex(damped)
    if int(info):
        raise RankwiseError(
            f"{where}: E[x x'] of its inputs is not positive with a `ridge` of {ridge:g}; take a larger one"
        )
    inverse = torch.cholesky_inverse(root)
    return 1 - ridge * inverse.diagonal()


def _tell(task: CompressionTask, influence: list[float], blocks: list[Widths]) -> None:
    """Put block influence and widths into the manifest and the log."""
    from lowrank.compression.widths import PARTS

    told = {part: [getattr(widths, part) for widths in blocks] for part in PARTS}
    task.account["widths"] = {"block_influence": influence, **told}
    for part, values in told.items():
        log.info("widths of %s, block by block: %s", part, ", ".join(map(str, values)))
