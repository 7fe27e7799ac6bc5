"""AA-SVD (2026): every matrix is fitted to the dense model's outputs on the inputs that the compressed model gives it.

With X the inputs of a layer in the dense model and X' those in the model of which the layers before it are compressed,
the best matrix of rank r in min ||W X - W' X'|| is, with L L'' = X' X'' ('' the transpose),

    W' = (W X X'' L^-T)_r L^-1,

the truncation of the least-squares answer. Layers are made in the order of the forward pass, so errors of those before
are worked against and not only passed on. One kept ratio for all.

`refine` trains the pairs of each block, once they are there, so that the block puts out what the dense one does
(`compression.block_refinement`); most of the authors' gain is that. Theirs trains all weights of the block, here only
the pairs are trained. `target: inputs` takes W X' for W X.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field

from lowrank.config.base import Name, NotNegative, Number, Positive
from lowrank.config.low_rank import UniformSettings
from lowrank.config.presets import Reads

if TYPE_CHECKING:
    import torch

    from lowrank.bases.weighted_svd import OrderedFactors
    from lowrank.compression.compress import CompressionTask
    from lowrank.compression.compressed_inputs import Products
    from lowrank.model.factors import LowRankFactors
    from lowrank.model.families import LinearModule


class Settings(UniformSettings):
    """AA-SVD runs the model, block by block, on its calibration windows."""

    reads: ClassVar[Reads] = ("tokens",)
    counts_windows: ClassVar[str] = "windows"

    kind: Literal["aa-svd"]
    calibration: Name
    target: Literal["dense", "inputs"] = Field(
        default="dense",
        description="outputs to fit; dense: the dense model's; inputs: the dense layer's on the inputs at hand",
    )
    windows: Positive | None = Field(default=None, description="calibration windows to use, the first ones; null: all")
    refine: NotNegative = Field(
        default=0, description="passes over the windows that train the pairs of each block; the authors have 25"
    )
    learning_rate: Annotated[Number, Field(gt=0)] = Field(default=1e-4, description="refine: of AdamW")
    batch_size: Positive = Field(default=8, description="refine: windows a step")

    @classmethod
    def unread(cls, given: Mapping[str, Any]) -> dict[str, str]:
        """Two numbers are about training."""
        reason = "is for `refine` only; leave it out"
        more = {} if given.get("refine") else dict.fromkeys(("learning_rate", "batch_size"), reason)
        return super().unread(given) | more

    @property
    def is_random(self) -> bool:
        """Another seed trains on the windows in another order."""
        return self.refine > 0


def compress(task: CompressionTask) -> Mapping[str, LowRankFactors]:
    """Make the layers of all blocks in order, at the rank that the uniform ratio buys.

    Raises:
        RankwiseError: a layer's inputs are all zero, a decomposition fails, or training diverges; named.
    """
    from lowrank.calibration.corpora import first_windows
    from lowrank.compression.block_refinement import BlockRefinement
    from lowrank.compression.compressed_inputs import factors_in_order
    from lowrank.model.devices import pick_devices
    from lowrank.model.partial_forward import on_devices
    from lowrank.search.uniform import uniform_layers

    settings, devices = task.settings, pick_devices()
    layers = uniform_layers(task.budget, task.ratio, settings.uncompressed, settings.rounding)
    if not layers:
        return {}
    ranks = {module.name: rank for module, rank in layers}

    def make(module: LinearModule, weight: torch.Tensor, products: Products) -> LowRankFactors:
        bias = task.model.get_submodule(module.name).bias
        return anchored_factors(weight, products, module.name).factors(ranks[module.name], bias)

    refine = None
    if settings.refine:
        training = (settings.refine, settings.learning_rate, settings.batch_size, task.seed)
        refine = BlockRefinement(task.model, devices[0], *training)
    windows = first_windows(task.required_tokens(), settings.windows, "windows")
    with on_devices(task.model, devices):
        return factors_in_order(
            task.model, windows, task.budget, ranks, make, devices[0], settings.target, refine, task.parts
        )


def anchored_factors(weight: torch.Tensor, products: Products, where: str) -> OrderedFactors:
    """The pairs of every rank that are nearest to W X on X'.

    Args:
        weight: W, m x n.
        products: of the inputs.
        where: the layer's name, for errors.

    Raises:
        RankwiseError: inputs are zero or not finite, or the decomposition fails; the layer is named.
    """
    from torch.linalg import solve_triangular

    from lowrank.bases.weighted_svd import balanced, singular_directions
    from lowrank.bases.whitening import cholesky_factor
    from lowrank.calibration.gram import symmetric

    root = cholesky_factor(symmetric(products.own), where)
    wanted = solve_triangular(root.T, weight.to(root) @ products.cross, upper=True, left=False)
    directions = singular_directions(wanted, where)
    down = solve_triangular(root, directions.T @ wanted, upper=False, left=False)
    return balanced(directions, down, weight.dtype)
