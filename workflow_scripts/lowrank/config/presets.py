"""Sections of presets: what a method is calibrated on, and searched with.

Stages rebuild a section from the plain dict that their rule passes, so these modules import nothing heavy.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from lowrank.config.base import (
    AtLeastTwo,
    Distinct,
    Name,
    Number,
    Percent,
    Positive,
    Section,
    Seed,
    Share,
    Text,
    wrong,
)
from lowrank.ranks.rounding import Rounding

if TYPE_CHECKING:
    from lowrank.model.families import Dimensions
    from lowrank.ranks.budget import Budget


class Calibration(Section):
    """Windows of token ids on which statistics are collected."""

    corpora: Distinct[Name] = Field(min_length=1, description="the windows come from each in equal numbers, in turn")
    windows: Positive = Field(description="of all corpora together")
    length: AtLeastTwo
    seed: Seed = 0
    gradient_windows: Positive | None = Field(
        default=None, description="loss gradients are collected on the first so many windows; null: on all"
    )
    gradient_draws: Positive | None = Field(
        default=None,
        description="next tokens at each position, drawn from the model's predictions, whose loss gradients are "
        "collected, each by a backward pass of its own; null: the one of the text",
    )

    expert_tokens: Positive | None = Field(
        default=None,
        description="of models with experts: an expert that gets fewer tokens of these windows stays dense; null: as "
        "many as the widest of its inputs has features, `hidden` or `intermediate`",
    )

    @model_validator(mode="after")
    def _gradients_on_windows_that_are_there(self) -> Calibration:
        if self.gradient_windows is not None and self.gradient_windows > self.windows:
            raise wrong("gradient_windows", f"{self.gradient_windows} is more than `windows: {self.windows}`")
        return self


_OF_POOLING = "`groups` is needed by `estimator: pooled`, and only by it"


class Covariance(Section):
    """An estimate of the covariance of a layer's outputs (paper, Section 3.1)."""

    estimator: Literal["pooled", "naive", "uncentred"] = Field(
        description="pooled: within groups of windows; naive: of all tokens; uncentred: the second moment, no mean is "
        "subtracted, so that pairs add no bias"
    )
    groups: Positive | None = Field(default=None, description="pooled only: number of groups of windows")
    gradients: Literal["none", "predict", "weigh"] = Field(
        default="none",
        description="predict: the bases say what leaving out a direction costs the loss; weigh: and are chosen by it",
    )
    damping: Share = Field(
        default=0.01,
        description="weigh, and where `rankwise` removes neurons: share of each output's own second moment of the "
        "gradient that is added to it",
    )
    directions: Literal["break-even", "all"] = Field(
        default="break-even",
        description="all: also those beyond the break-even rank, for pairs with an identity block; with `gradients` "
        "all are there",
    )

    @classmethod
    def unread(cls, given: Mapping[str, Any]) -> dict[str, str]:
        """Only a pooled estimate has groups, and only gradients are damped."""
        reasons = {} if given.get("estimator") == "pooled" else {"groups": _OF_POOLING}
        if given.get("gradients", "none") == "none":
            reasons["damping"] = "says nothing to `gradients: none`; leave it out"
        return reasons

    @model_validator(mode="after")
    def _pooling_needs_groups(self) -> Covariance:
        if self.estimator == "pooled" and self.groups is None:
            raise wrong("groups", _OF_POOLING)
        return self

    @property
    def centred(self) -> bool:
        """Whether a mean is subtracted, which pairs need a bias to put back."""
        return self.estimator != "uncentred"

    @property
    def holds_all_directions(self) -> bool:
        """Whether bases go beyond the largest rank at which a plain pair saves parameters."""
        return self.directions == "all" or self.gradients != "none"


class Selection(Section):
    """Which windows of a validation corpus the search is judged on (paper, Section 3.3)."""

    strategy: Literal["top", "bottom", "all"] = Field(
        default="top",
        description="by the variance of a window's perplexity over random allocations; all: every window, unscored; "
        "it takes no other key",
    )
    keep: Positive | None = Field(default=None, description="how many; not with `strategy: all`")
    allocations: AtLeastTwo = 20
    ratio: Percent = 20
    groups: Positive = Field(default=4, description="groups of layers of the random allocations")
    uncompressed: tuple[Text, ...] = ("v",)
    lower: Share = 0.2
    calibration: Name | None = Field(default=None, description="of the bases; needed unless `strategy: all`")
    covariance: Name | None = Field(default=None, description="needed unless `strategy: all`")

    @classmethod
    def unread(cls, given: Mapping[str, Any]) -> dict[str, str]:
        """Scoring is described where windows are scored."""
        if given.get("strategy") != "all":
            return {}
        reason = "says nothing to `strategy: all`, which keeps every window unscored; leave it out"
        return {key: reason for key in cls.model_fields if key != "strategy"}

    @model_validator(mode="after")
    def _scoring_needs_bases(self) -> Selection:
        for key in ("calibration", "covariance"):
            if self.scores and getattr(self, key) is None:
                raise wrong(key, f"missing; `strategy: {self.strategy}` scores windows with the bases that it names")
        return self

    @property
    def scores(self) -> bool:
        """Whether windows are chosen by their perplexities, so that a model and its bases are needed."""
        return self.strategy != "all"


class Validation(Section):
    """Windows on which the search compares allocations."""

    corpora: Distinct[Name] = Field(min_length=1, description="the candidates come from each in equal numbers")
    windows: Positive = Field(description="candidates of all corpora together, of which `select.keep` remain")
    length: AtLeastTwo
    seed: Seed = 0
    select: Selection

    @model_validator(mode="after")
    def _keep_at_most_all(self) -> Validation:
        if self.select.keep is None and self.select.scores:
            raise wrong("select.keep", "is needed by `strategy: top` and `bottom`")
        if self.select.keep is not None and self.select.keep > self.windows:
            raise wrong("select.keep", f"{self.select.keep} is more than the candidates (`windows: {self.windows}`)")
        return self


Kept = Annotated[Number, Field(gt=0, le=1)]
"""A kept ratio of a matrix; 1 means dense."""


class LengthScales(Section):
    """Length scales of the search's kernel, in units of the variables' range (paper: attention 1.0, MLP 0.8)."""

    attention: Annotated[Number, Field(gt=0)]
    mlp: Annotated[Number, Field(gt=0)]
    learned: bool = Field(default=False, description="fit them to the trials, starting here; else they stay fixed")


_OF_RATIOS = ("start", "start_at", "lower", "upper", "bounds", "band", "rounding")


class Search(Section):
    """Bayesian optimisation of the kept ratios (paper, Section 3.3; GPyTorch model, BoTorch acquisition)."""

    evaluations: Positive = Field(default=50, description="in total, the initial ones included")
    initial: Positive = Field(
        default=5, description="first points: transferred, `start`, `start_at`, then points far from each other"
    )
    start: Distinct[Literal["uniform", "lord"]] = Field(
        default=["uniform", "lord"], description="allocations to begin with: all ratios equal, and LoRD's"
    )
    start_at: dict[Name, Kept] | None = Field(
        default=None, description="a further allocation to begin with: tied type (as `qk`) -> kept ratio"
    )
    variables: Literal["kept-ratios", "loss-scales"] = Field(
        default="kept-ratios",
        description="kept-ratios: of each type and group of layers; loss-scales: a factor on the predicted losses of "
        "each, which then decide the ranks; the bases must predict them",
    )
    largest_scale: Annotated[Number, Field(gt=1)] = Field(
        default=8, description="loss-scales: factors lie between this and one over it"
    )
    lower: Share = Field(default=0.2, description="smallest kept ratio of a matrix")
    upper: Kept = Field(default=1.0, description="largest kept ratio; 1 means dense")
    bounds: dict[Name, tuple[Share, Kept]] = Field(
        default_factory=dict, description="tied type (as `qk`) -> smallest and largest kept ratio of its own"
    )
    kl_weight: Annotated[Number, Field(ge=0)] = Field(
        default=4.096, description="weight of the KL divergence; 4.096 a token is the paper's 1e-3 x 4096"
    )
    kl_direction: Literal["reverse", "forward"] = Field(
        default="reverse", description="reverse: KL(compressed || dense); forward: KL(dense || compressed)"
    )
    kl_reduction: Literal["token", "sequence"] = Field(
        default="token", description="mean over tokens; or sum over a window's positions, mean over windows"
    )
    band: Share | None = Field(
        default=None,
        description="by how much the kept share may fall short of the budget, sampled by rejection; null: not at all",
    )
    rounding: Rounding = Field(
        default="give-back",
        description="to multiples of 8; give-back: down, and what that frees is given back; down: as the paper's "
        "authors have it, and smaller where that exceeds the budget",
    )
    response: Literal["log", "raw"] = Field(default="log", description="scale on which the objective is modelled")
    acquisition: Literal["log-ei", "ei", "noisy-log-ei"] = "log-ei"
    random_share: Annotated[Number, Field(ge=0, lt=1)] = Field(
        default=0.0, description="share of the steps that try a random allocation"
    )
    length_scales: LengthScales | None = Field(default=None, description="null: one a variable, learned")

    @model_validator(mode="before")
    @classmethod
    def _bounds_are_pairs(cls, value: Any) -> Any:
        """YAML and JSON write a pair as a list, which a strict check would refuse."""
        if not isinstance(value, dict) or not isinstance(bounds := value.get("bounds"), dict):
            return value
        pairs = {name: tuple(pair) if isinstance(pair, list) else pair for name, pair in bounds.items()}
        return {**value, "bounds": pairs}

    @classmethod
    def unread(cls, given: Mapping[str, Any]) -> dict[str, str]:
        """Ratios and scales have their own keys."""
        variables = given.get("variables", cls.default_of("variables"))
        other = _OF_RATIOS if variables == "loss-scales" else ("largest_scale",)
        return dict.fromkeys(other, f"says nothing to `variables: {variables}`; leave it out")

    @model_validator(mode="after")
    def _initial_points_fit(self) -> Search:
        if self.initial > self.evaluations:
            raise wrong("initial", f"{self.initial} is more than `evaluations: {self.evaluations}`")
        if self.variables == "loss-scales":
            return self
        points = len(self.start) + (self.start_at is not None)
        if points > self.initial:
            raise wrong("start", f"{points} points with `start_at`, more than `initial: {self.initial}`")
        for name, (lower, upper) in [("", (self.lower, self.upper)), *self.bounds.items()]:
            if lower >= upper:
                raise wrong(f"bounds.{name}" if name else "lower", f"{lower:g} is not below the upper bound {upper:g}")
        return self


class SensitivityStudy(Section):
    """Perplexity when only one type of matrix is compressed (paper, Figure 1)."""

    model: Name
    calibration: Name
    covariance: Name
    corpus: Name
    windows: Positive
    length: AtLeastTwo
    seed: Seed = 0
    kept: Distinct[Share] = Field(min_length=1)


class Transfer(Section):
    """An allocation found elsewhere, at the same ratio and seed: its kept ratios are used, never its ranks."""

    model: Name
    method: Name


ANY_MULTIPLE = "any"
"""Of eliminations of neurons that serve all multiples, since no pairs are made of what is left."""
Reads = tuple[Literal["statistics", "gradients", "tokens"], ...]


class MethodSettings(Section):
    """What a method preset may name; a method's own settings class extends it.

    A preset with a `covariance` reads factor bases, one with a `search` reads an allocation, one with a `transfer`
    begins that search with the ratios found for another model.

    Attributes:
        reads: what the method reads of its calibration besides: `statistics` (moments of the inputs of all layers),
            `gradients` (second moments of the loss gradients at their outputs), `tokens` (the windows themselves).
        makes_pairs: its compressed layers are low-rank pairs, which have ranks to show and scales to train.
        beside_ratio: a key that may decide what is kept whatever a row's ratio says; left out, the ratio decides.
    """

    reads: ClassVar[Reads] = ()
    makes_pairs: ClassVar[bool] = True
    beside_ratio: ClassVar[str] = ""

    kind: str
    calibration: Name | None = None
    covariance: Name | None = None
    validation: Name | None = None
    search: Name | None = None
    transfer: Transfer | None = None

    @classmethod
    def unread(cls, given: Mapping[str, Any]) -> dict[str, str]:
        """A key that the method's own class does not declare would be computed for nothing."""
        above = [each for each in cls.__mro__ if issubclass(each, MethodSettings) and each is not MethodSettings]
        own = {name for each in above for name in inspect.get_annotations(each)}
        of_kind = f"methods of kind '{given.get('kind')}'"
        reasons = {
            name: f"{of_kind} read no {name}; leave it out, or take another `kind`"
            for name in ("calibration", "covariance", "validation", "search")
            if name not in own
        }
        if "search" in reasons or given.get("search") is None:
            reasons["transfer"] = f"{of_kind} have no search that could begin with it"
        return reasons

    @property
    def needs(self) -> Reads:
        """What this very preset reads of its calibration; a setting may ask for more than the method's `reads`."""
        return self.reads

    @property
    def eliminates(self) -> str | None:
        """Which eliminations of neurons this very preset reads: those with pairs of numbers of neurons that are
        multiples of it, or `ANY_MULTIPLE`; None: none."""
        return None

    @property
    def decompositions(self) -> int:
        """How many times a method that decomposes matrices itself does so with each."""
        return 1

    @property
    def has_pairs(self) -> bool:
        """Whether low-rank pairs come out of this very preset."""
        return self.makes_pairs

    def why_not_experts(self, shape: Dimensions) -> str:
        """Why this preset cannot compress a model with experts; nothing if it can, or if the model has none."""
        if not shape.experts or self.takes_experts:
            return ""
        return (
            f"not defined for the experts of family '{shape.family}'; docs/families.md says which methods are, and "
            "by which of their settings"
        )

    @property
    def takes_experts(self) -> bool:
        """Whether this very preset is defined where a block has experts, each with tokens of its own."""
        return False

    @property
    def has_order(self) -> bool:
        """Whether the dimensions of its pairs are in the order of what they carry, as a tuning may ask for."""
        return True

    @property
    def sets_aside_ratio(self) -> bool:
        """Whether the key of `beside_ratio` is in use."""
        return bool(self.beside_ratio) and getattr(self, self.beside_ratio) != self.default_of(self.beside_ratio)

    @property
    def is_random(self) -> bool:
        """Whether the seed decides what comes out: it then runs once for each of the study's seeds."""
        return self.search is not None

    def misfits(self, budget: Budget, ratio: int, calibration: Calibration | None) -> Iterator[tuple[str, str]]:
        """What shapes alone tell against this preset, each with the key to blame; methods that prune override it.

        The ranges of kept ratios that `uncompressed` and a `search` leave are checked for all methods.

        Args:
            budget: of the model.
            ratio: percent of its linear weights to remove, at least 1.
            calibration: the preset's own, if it names one that exists.

        Yields:
            (a key of the preset, or "" for the ratio; what is wrong, and what to do).
        """
        yield from ()

    def kept_parameters(self, budget: Budget, ratio: int) -> int | None:
        """Parameters of the decoder's linear layers in the checkpoint, where shapes alone decide them.

        Counted as `model.parameters.count_parameters` does: with the biases, indices and shortcuts that are added.

        Args:
            budget: of the model, in the form of the preset's pairs if it makes any.
            ratio: percent of its linear weights to remove, at least 1.

        Returns:
            The number; None where it is a matter of data or of a search.

        Raises:
            RankwiseError: the ratio is out of reach.
        """
        return None
