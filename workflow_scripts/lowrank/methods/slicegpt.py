"""SliceGPT: principal bases of the residual stream, and fewer channels of it.

The stream of each place between the embeddings and the last block is written in its principal basis and cut to its
first channels; the layers around it shrink, and the residual connections become matrices that change the basis. The
embeddings, the final norm and the head stay as they are, for they may be tied and the budget does not count them.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field

from lowrank.config.base import Name, Number
from lowrank.config.presets import MethodSettings

if TYPE_CHECKING:
    from lowrank.compression import CompressionTask
    from lowrank.replacements import Replacements
    from lowrank.slicing import Widths

log = logging.getLogger(__name__)


class Settings(MethodSettings):
    """SliceGPT runs the model, block by block, on its calibration windows."""

    reads: ClassVar[tuple[Literal["statistics", "tokens"], ...]] = ("tokens",)

    kind: Literal["slicegpt"]
    calibration: Name
    slice: Annotated[Number, Field(ge=0, lt=1)] | None = Field(
        default=None,
        description="share of the channels to cut, whatever parameters that leaves, as its authors give it; "
        "null: as many as the ratio asks for, the matrices in residual connections counted",
    )


def compress(task: CompressionTask) -> Replacements:
    """Choose the widths, then rotate and slice block by block.

    Raises:
        RankwiseError: a budget out of reach, or blocks that cannot be rotated.
    """
    from lowrank.rotation import rotate_and_slice
    from lowrank.runtime import pick_device

    if not task.ratio and task.settings.slice is None:
        return {}
    return rotate_and_slice(task.model, task.required_tokens(), _widths(task), pick_device())


def _widths(task: CompressionTask) -> Widths:
    """The stream's widths, by the ratio or by the setting."""
    from lowrank.config.sources import ModelShape
    from lowrank.slicing import describe_widths, reference_total, sliced_parameters, widths_of_slice, widths_within

    budget, share = task.budget, task.settings.slice
    shape = budget.dimensions
    chosen = share is not None
    widths = widths_of_slice(shape.hidden, shape.layers, share) if chosen else widths_within(budget, task.ratio)
    kept = 100 * sliced_parameters(budget, widths) / budget.dense_parameters
    log.info("%s of %d channels: %.2f %% of the linear weights stay", describe_widths(widths), shape.hidden, kept)
    if chosen and isinstance(shape, ModelShape):
        total = reference_total(shape, widths[1])
        log.info("`slice: %g` is followed, not the ratio; its authors would count %d parameters in all", share, total)
    return widths
