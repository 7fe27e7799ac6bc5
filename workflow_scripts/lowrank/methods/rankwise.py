"""Ranks by predicted loss, directions by the Fisher information, factors with an identity block: no search at all.

One backward pass says how much the loss cares about each direction of each output. That gives the directions to keep
(`bases.fisher`), the loss that every rank is predicted to cost, and with it the best allocation under the
budget (`ranks.predicted_loss`). An identity block in one factor of each pair buys more rank for the same parameters.
What removing neurons of an MLP costs is predicted in the same unit (`compression.neurons`), so `mlp` may prune them
under the same multiplier, instead of low rank or before it. Whole blocks are compared by their influence as well
(`ranks.blocks`). docs/rankwise.md derives the ranks, `compression.neurons` the neurons.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from lowrank.config.base import Name, Positive
from lowrank.config.low_rank import LowRankSettings
from lowrank.config.presets import ANY_MULTIPLE, Calibration, Reads
from lowrank.ranks.budget import ALIGNMENT

if TYPE_CHECKING:
    from lowrank.compression.compress import CompressionTask
    from lowrank.compression.narrower import Choice
    from lowrank.model.replacements import Replacements
    from lowrank.ranks.budget import Budget

log = logging.getLogger(__name__)

_ATTENTION = {"q", "k", "v", "o"}
INFLUENCE_WINDOWS = 16
"""Calibration windows that the influence of blocks is measured on; it is a mean over tokens, and settles soon."""


class Settings(LowRankSettings):
    """It reads bases whose preset of `covariance` names `gradients`, for these say what a direction is worth."""

    kind: Literal["rankwise"]
    calibration: Name
    covariance: Name
    identity_block: bool = Field(default=True, description="store pairs with an identity block: more rank a parameter")
    uncompressed: tuple[str, ...] = Field(default=(), description="types that stay dense")
    mlp: Literal["pairs", "neurons", "both"] = Field(
        default="pairs",
        description="pairs: a low-rank pair for each matrix; neurons: fewer neurons, for which those that stay are "
        "refitted to stand in, and plain matrices; both: fewer neurons, pairs, or pairs of the neurons that are left, "
        "whatever the prediction prefers, block by block",
    )
    widths: Literal["own", "one"] = Field(
        default="own", description="`mlp: neurons` only; own: each block keeps as many as pays; one: all keep as many"
    )
    multiple: Positive = Field(
        default=ALIGNMENT, description="not with `mlp: pairs`; numbers of neurons that stay are multiples of it"
    )

    influence: bool = Field(
        default=True,
        description="compare blocks by the geometric mean of what they are predicted to lose and of how much they turn "
        "the residual stream; false: by predicted losses alone",
    )

    @classmethod
    def unread(cls, given: Mapping[str, Any]) -> dict[str, str]:
        """Numbers of neurons are for those who prune."""
        reasons, mlp = super().unread(given), given.get("mlp", "pairs")
        if mlp != "neurons":
            reasons["widths"] = f"`one` makes plain matrices of one shape, and `mlp: {mlp}` does not; leave it out"
        if given.get("widths") == "one" and set(given.get("uncompressed") or ()) >= _ATTENTION:
            reasons["influence"] = (
                "says nothing where all blocks have one width and attention stays dense; leave it out"
            )
        if mlp == "pairs":
            reasons["multiple"] = "says nothing to `mlp: pairs`, which removes no neurons; leave it out"
        return reasons

    @property
    def needs(self) -> Reads:
        """Refitting the neurons that stay wants to know how they move together, and their pairs what an error of
        outputs costs; the influence of blocks comes from running the model."""
        neurons: Reads = () if self.mlp == "pairs" else ("statistics", "gradients")
        return (*neurons, "tokens") if self.influence and self._compares_blocks else neurons

    @property
    def _compares_blocks(self) -> bool:
        """Not if one width of all MLPs is all that there is to choose."""
        return self.widths == "own" or not set(self.uncompressed) >= _ATTENTION

    @property
    def windows(self) -> int:
        """How many calibration windows the model is run on."""
        return INFLUENCE_WINDOWS

    @property
    def eliminates(self) -> str | None:
        """`both` makes pairs of some numbers of neurons; all that `neurons` may choose from is in one elimination."""
        return {"pairs": None, "neurons": ANY_MULTIPLE, "both": str(self.multiple)}[self.mlp]

    @property
    def has_pairs(self) -> bool:
        """None if MLPs lose neurons alone and all of attention stays dense."""
        return self.mlp != "neurons" or not set(self.uncompressed) >= _ATTENTION

    def misfits(self, budget: Budget, ratio: int, calibration: Calibration | None) -> Iterator[tuple[str, str]]:
        """Where neurons go, the MLP is no type that stays dense, and there are enough of them to choose from."""
        from lowrank.compression.branches import Structure

        if self.mlp == "pairs":
            return
        branch = Structure.of(budget).mlp
        types = [linear.name for linear in (*branch.writers, branch.reader)]
        if dense := [name for name in self.uncompressed if name in types]:
            yield "uncompressed", f"{', '.join(dense)} cannot stay dense where neurons go; take `mlp: pairs`"
        fewest, *more = branch.may_stay(self.multiple)
        if not more:
            yield (
                "multiple",
                f"{self.multiple} leaves no choice to blocks of {branch.units} neurons; take a smaller one",
            )
        elif (least := self._least(budget)) > budget.allowed(ratio):
            yield (
                "",
                f"removing {ratio} % is out of reach: the smallest ranks and {fewest} neurons a block "
                f"leave {100 * least / budget.dense_parameters:.1f} %; remove less, or compress more types",
            )

    def _least(self, budget: Budget) -> float:
        """Parameters that stay at least."""
        from lowrank.compression.branches import Structure
        from lowrank.ranks.reach import smallest_choice

        branch, total = Structure.of(budget).mlp, 0
        for module in budget.modules:
            if module.type not in (*branch.writers, branch.reader):
                dense = module.type.name in self.uncompressed
                total += budget.cost(module, None if dense else smallest_choice(budget, module))
        gone = branch.units - branch.may_stay(self.multiple)[0]
        return total + budget.dimensions.layers * (branch.units * branch.cost - branch.saved(gone))

    @property
    def takes_experts(self) -> bool:
        """Low-rank pairs of each matrix; neurons of experts are not pruned."""
        return self.mlp == "pairs"


def compress(task: CompressionTask) -> Replacements:
    """Allocate ranks and neurons by predicted loss, slice the bases, refit what neurons leave.

    Raises:
        RankwiseError: the bases hold no predicted losses, or an input is missing or damaged; the layer or the file is
            named.
    """
    from lowrank.compression.narrower import Mlps
    from lowrank.model.replacements import Deferred
    from lowrank.ranks.predicted_loss import MEANING, allocate
    from lowrank.search.allocation import sliced_factors
    from lowrank.search.loss_scales import predicted_losses

    bases, settings = task.required_bases(), task.settings
    losses = predicted_losses(bases, task.budget)
    prunes = settings.mlp != "pairs" and task.ratio > 0
    mlps = Mlps(task, settings.multiple, settings.widths == "one", settings.mlp == "both") if prunes else None
    groups = mlps.groups() if mlps else {}
    influence = _influence(task) if "tokens" in settings.needs and task.ratio > 0 else None
    allocation = allocate(task.budget, task.ratio, losses, settings.uncompressed, groups, influence)
    task.account["predicted_loss_rise"] = {"nats_per_token": allocation.loss, "meaning": MEANING}
    log.info(
        "predicted rise of the loss: %.4f nats per token (%s; expect more of other text)", allocation.loss, MEANING
    )
    factors = sliced_factors(bases, task.model, task.budget, allocation.ranks)
    if mlps is None:
        return factors
    _tell(task, mlps.chosen(allocation.picked))
    narrower = mlps.replacements(allocation.picked)
    return Deferred([*factors, *narrower], lambda name: narrower[name] if name in narrower else factors[name])


def _influence(task: CompressionTask) -> list[float]:
    """Of every block, on the first windows; the manifest has it."""
    from lowrank.compression.influence import block_influence
    from lowrank.model.devices import pick_devices

    influence = block_influence(task.model, task.required_tokens()[:INFLUENCE_WINDOWS], pick_devices())
    task.account["influence"] = influence
    log.info("influence of the blocks: %s", ", ".join(f"{value:.3f}" for value in influence))
    return influence


def _tell(task: CompressionTask, chosen: dict[int, Choice]) -> None:
    """Put the numbers of neurons into the manifest and the log."""
    counts = [choice.neurons for _, choice in sorted(chosen.items())]
    task.account["neurons"] = {"dense": task.budget.dimensions.intermediate, "kept": counts}
    log.info("neurons kept, block by block: %s", ", ".join(map(str, counts)))
