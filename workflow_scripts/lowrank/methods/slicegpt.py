"""SliceGPT: principal bases of the residual stream, and fewer channels of it.

The stream of each place between the embeddings and the last block is written in its principal basis and cut to its
first channels; the layers around it shrink, and the residual connections become matrices that change the basis. The
embeddings, the final norm and the head stay as they are, for they may be tied and the budget does not count them.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field

from lowrank.config.base import Name, Number
from lowrank.config.presets import Calibration, MethodSettings

if TYPE_CHECKING:
    from lowrank.compression.compress import CompressionTask
    from lowrank.compression.slicing import Widths
    from lowrank.model.replacements import Replacements
    from lowrank.ranks.budget import Budget

log = logging.getLogger(__name__)


class Settings(MethodSettings):
    """SliceGPT runs the model, block by block, on its calibration windows."""

    reads: ClassVar[tuple[Literal["statistics", "tokens"], ...]] = ("tokens",)
    makes_pairs: ClassVar[bool] = False
    beside_ratio: ClassVar[str] = "slice"

    kind: Literal["slicegpt"]
    calibration: Name
    slice: Annotated[Number, Field(ge=0, lt=1)] | None = Field(
        default=None,
        description="share of the channels to cut, whatever parameters that leaves, as its authors give it; "
        "null: as many as the ratio asks for, the matrices in residual connections counted",
    )

    def misfits(self, budget: Budget, ratio: int, calibration: Calibration | None) -> Iterator[tuple[str, str]]:
        """Not every stream can be rotated; its ends stay at full width, so some ratios are out of reach."""
        from lowrank.compression.slicing import require_plain_branches
        from lowrank.errors import RankwiseError

        try:
            require_plain_branches(budget.dimensions.family)
        except RankwiseError as error:
            yield "kind", str(error)
            return
        try:
            widths_of(self.slice, budget, ratio)
        except RankwiseError as error:
            yield "slice" if self.slice is not None else "", str(error)

    def kept_parameters(self, budget: Budget, ratio: int) -> int | None:
        """The widths of the stream decide, with the matrices in its residual connections."""
        from lowrank.compression.slicing import sliced_parameters

        return sliced_parameters(budget, widths_of(self.slice, budget, ratio))


def compress(task: CompressionTask) -> Replacements:
    """Choose the widths, then rotate and slice block by block.

    Raises:
        RankwiseError: a budget out of reach, or blocks that cannot be rotated.
    """
    from lowrank.compression.rotation import rotate_and_slice
    from lowrank.compression.slicing import require_plain_branches
    from lowrank.model.runtime import pick_device

    if not task.ratio and task.settings.slice is None:
        return {}
    require_plain_branches(task.budget.dimensions.family)
    return rotate_and_slice(task.model, task.required_tokens(), _widths(task), pick_device())


def widths_of(share: float | None, budget: Budget, ratio: int) -> Widths:
    """The stream's widths, by the setting `slice` or, without it, by the ratio.

    Raises:
        RankwiseError: they are out of reach.
    """
    from lowrank.compression.slicing import widths_of_slice, widths_within

    if share is None:
        return widths_within(budget, ratio)
    return widths_of_slice(budget.dimensions.hidden, budget.dimensions.layers, share)


def _widths(task: CompressionTask) -> Widths:
    """The stream's widths; what they leave is logged."""
    from lowrank.compression.slicing import describe_widths, reference_total, sliced_parameters
    from lowrank.config.sources import ModelShape

    budget, share = task.budget, task.settings.slice
    shape = budget.dimensions
    widths = widths_of(share, budget, task.ratio)
    kept = 100 * sliced_parameters(budget, widths) / budget.dense_parameters
    log.info("%s of %d channels: %.2f %% of the linear weights stay", describe_widths(widths), shape.hidden, kept)
    if share is not None and isinstance(shape, ModelShape):
        total = reference_total(shape, widths[1])
        log.info("`slice: %g` is followed, not the ratio; its authors would count %d parameters in all", share, total)
    return widths
