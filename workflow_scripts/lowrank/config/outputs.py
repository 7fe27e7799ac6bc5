"""Sections of tables and figures."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import Field

from lowrank.config.base import AtLeastTwo, Distinct, Name, Number, Percent, Positive, Section, Seed, Share, Text

Tolerance = Annotated[
    Number, Field(ge=0, description="percentage points by which the share truly removed may miss the ratio")
]


def tolerance_holder(place: str) -> str:
    """What of a config has the `tolerance` of a place in it: a row, or a figure that has ratios and no rows."""
    return "figure" if place.startswith("figures.") and ".rows[" not in place else "row"


class PublishedRow(Section):
    """A row of `config/published/<file>.csv`: the value that somebody printed, never one of ours."""

    file: Name
    model: Text
    method: Text
    ratio: Annotated[int, Field(ge=0, le=90)]


class Row(Section):
    """One row of a table: a model after a method, a ratio and a tuning."""

    model: Name
    method: Name
    ratio: Annotated[int, Field(ge=0, le=90)] = Field(default=0, description="percent removed; 0 for the dense model")
    tuning: Name = "none"
    tolerance: Tolerance = 0.5
    label: Text | None = None
    published: PublishedRow | None = None

    @property
    def title(self) -> str:
        """Label or preset name, and the preset of post-training if there was one."""
        name = self.label or self.method
        return name if self.tuning == "none" else f"{name} + {self.tuning}"

    def met_by(self, kept: float) -> bool:
        """Whether keeping so many percent of the decoder's linear weights removes what the row asks for.

        The check of the config asks this where shapes decide what is kept, and tables ask it of every checkpoint.
        """
        return not self.ratio or self.missed_by(kept) <= self.tolerance

    def missed_by(self, kept: float) -> float:
        """Percentage points between what is removed and the ratio."""
        return abs(100 - kept - self.ratio)

    def tolerance_for(self, kept: float) -> float:
        """The smallest tolerance, in tenths of a point, with which this would be met."""
        missed = self.missed_by(kept)
        tenths = math.ceil(10 * missed)
        return (tenths if tenths / 10 >= missed else tenths + 1) / 10


class RowTable(Section):
    """A table with one line a row: a model after a method, a ratio and a tuning.

    accuracy: methods x tasks and corpora (Tables 1 to 6, 10). differences: of the loss on held-out text and of the
    mean accuracy on tasks, each row against the first of its model and ratio or against the dense model, paired by
    windows and documents; with perplexities, and with a cost suite how fast a prompt is read. statistics: parameters,
    MACs, memory (Table 7). times: measured durations. allocations: ranks by type and group (Table 8). generations:
    texts (Table 9).
    """

    kind: Literal["accuracy", "differences", "statistics", "times", "allocations", "generations"]
    title: Text
    suites: Distinct[Name] = Field(
        default_factory=list,
        description="accuracy and differences: zero-shot and perplexity, differences also cost; others: cost",
    )
    tasks: Literal["each", "mean"] = Field(default="each", description="accuracy: a column a task, or only their mean")
    reference: Literal["first", "dense"] = Field(
        default="first",
        description="differences: less the first row of the same model and ratio, or less the model's dense row",
    )
    rows: list[Row] = Field(min_length=1)

    @classmethod
    def unread(cls, given: Mapping[str, Any]) -> dict[str, str]:
        """Only differences are taken from something."""
        reason = "only a table of differences compares its rows; leave it out"
        return {} if given.get("kind") == "differences" else {"reference": reason}


class AgreementTable(Section):
    """Ours against the published values of other tables: every cell that both have, and the difference."""

    kind: Literal["agreement"]
    title: Text
    tables: Distinct[Name] = Field(min_length=1, description="accuracy and statistics tables of this config")

    @property
    def rows(self) -> list[Row]:
        """It has no rows of its own."""
        return []

    @property
    def suites(self) -> list[str]:
        """It has no suites of its own."""
        return []


class ArithmeticRow(Section):
    """Published ranks, and the published numbers that should follow from them and a model's shapes."""

    model: Name = Field(description="the model of this config that has the shapes")
    ranks: PublishedRow
    statistics: PublishedRow
    units_of: Name | None = Field(default=None, description="model in whose units the ranks are printed; null: `model`")


class ArithmeticTable(Section):
    """Parameters and MACs computed from published ranks and shapes alone, beside the published numbers."""

    kind: Literal["arithmetic"]
    title: Text
    checks: list[ArithmeticRow] = Field(min_length=1)

    @property
    def rows(self) -> list[Row]:
        """It has no rows of its own."""
        return []

    @property
    def suites(self) -> list[str]:
        """It has no suites of its own."""
        return []


Table = Annotated[RowTable | AgreementTable | ArithmeticTable, Field(discriminator="kind")]


class SensitivityFigure(Section):
    """Figure 1: perplexity against kept ratio, one line a type of matrix, one panel a study."""

    kind: Literal["sensitivity"]
    title: Text
    sensitivity: Distinct[Name] = Field(min_length=1)


class PerplexityFigure(Section):
    """Figure 3: perplexity against the removed ratio, one line a method, one panel a corpus."""

    kind: Literal["perplexity"]
    title: Text
    model: Name
    suite: Name
    methods: Distinct[Name] = Field(min_length=1)
    ratios: Distinct[Percent] = Field(min_length=1)
    tolerance: Tolerance = 0.5

    def point(self, method: str, ratio: int) -> Row:
        """One of its points."""
        return Row(model=self.model, method=method, ratio=ratio, tolerance=self.tolerance)


class ComparisonFigure(Section):
    """Perplexity of some rows: objectives of the search, transfers, tunings, calibration on other text.

    comparison: side by side, one panel a corpus. heat-map: a line a row and a column a corpus, one panel a ratio, with
    the best row of each column; each model's dense row is among them.
    """

    kind: Literal["comparison", "heat-map"]
    title: Text
    suite: Name
    rows: list[Row] = Field(min_length=1)


def namesakes(rows: Sequence[Row]) -> Iterator[tuple[int, int]]:
    """(index, index of an earlier row) of every row that a figure would show under the other's name."""
    first: dict[tuple[str, int, str], int] = {}
    for index, row in enumerate(rows):
        earlier = first.setdefault((row.model, row.ratio, row.title), index)
        if earlier != index:
            yield index, earlier


class SearchFigure(Section):
    """The best objective found after each evaluation, one line a method, one panel a ratio."""

    kind: Literal["search"]
    title: Text
    model: Name
    methods: Distinct[Name] = Field(min_length=1)
    ratios: Distinct[Percent] = Field(min_length=1)


class PredictedLossFigure(Section):
    """What truncating single matrices was predicted to cost, against what it costs: one panel a covariance."""

    kind: Literal["predicted-loss"]
    title: Text
    model: Name
    calibration: Name
    covariance: Distinct[Name] = Field(min_length=1, description="presets that name `gradients`")
    corpus: Name = Field(description="measured on; no text that the calibration saw")
    windows: Positive
    length: AtLeastTwo
    seed: Seed = 0
    matrices: Positive = Field(default=42, description="how many are truncated, each alone; as many of every type")
    kept: Distinct[Share] = Field(
        default=[0.2, 0.4, 0.6, 0.8], min_length=1, description="shares of a matrix's possible rank that are tried"
    )


Figure = Annotated[
    SensitivityFigure | PerplexityFigure | ComparisonFigure | SearchFigure | PredictedLossFigure,
    Field(discriminator="kind"),
]
