"""First and second moments of a layer's inputs, from one pass, for every estimate of the covariance.

Stored per input site: the covariance over all tokens, and the mean of each window. A pooled covariance with any
groups of consecutive windows follows exactly: the scatter within groups is the total scatter less that between
the groups' means. So a new number of groups needs no new pass.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from lowrank.config.presets import Covariance
from lowrank.errors import RankwiseError


class MomentAccumulator:
    """Running moments of n features over windows of equal length.

    Products are formed in float32, window batch by window batch, and added up in float64. A pilot mean (that of
    the first batch) is subtracted first, so that features with a large mean lose no digits.
    """

    def __init__(self, features: int, device: torch.device | str = "cpu") -> None:
        self.pilot: torch.Tensor | None = None
        self.products = torch.zeros(features, features, dtype=torch.float64, device=device)
        self.absolute = torch.zeros(features, dtype=torch.float64, device=device)
        self.window_sums: list[torch.Tensor] = []
        self.window_length = 0

    def update(self, inputs: torch.Tensor, where: str) -> None:
        """Add a batch of windows: b x length x n.

        Raises:
            RankwiseError: values that are not finite; `where` names the layer.
        """
        x = inputs.detach().float()
        if not bool(x.isfinite().all()):
            raise RankwiseError(
                f"{where}: inputs are not finite. Set `dtype: float32` for this model in the config; "
                "if it is float32 already, the weights are damaged."
            )
        if self.pilot is None:
            self.pilot = x.mean(dim=(0, 1))
        self.window_length = x.shape[1]
        shifted = x - self.pilot
        flat = shifted.flatten(0, 1)
        self.products += (flat.T @ flat).double()
        self.absolute += x.abs().sum(dim=(0, 1), dtype=torch.float64)
        self.window_sums.append(shifted.sum(dim=1, dtype=torch.float64))

    def result(self) -> Moments:
        """The moments of everything seen so far."""
        assert self.pilot is not None, "no window was added"
        shifted_means = torch.cat(self.window_sums) / self.window_length
        tokens = shifted_means.shape[0] * self.window_length
        mean = shifted_means.mean(dim=0)
        covariance = self.products / tokens - torch.outer(mean, mean)
        return Moments(
            covariance=(covariance + covariance.T) / 2,
            window_means=shifted_means + self.pilot.double(),
            absolute_mean=self.absolute / tokens,
            window_length=self.window_length,
        )


@dataclass(frozen=True)
class Moments:
    """Moments of one input site.

    Attributes:
        covariance: n x n, over all tokens, divided by their number.
        window_means: w x n, mean of each window, in the order of the calibration file.
        absolute_mean: n, mean of |x|.
        window_length: tokens in a window.
    """

    covariance: torch.Tensor
    window_means: torch.Tensor
    absolute_mean: torch.Tensor
    window_length: int

    @property
    def tokens(self) -> int:
        """Tokens seen."""
        return self.window_means.shape[0] * self.window_length

    def estimate(self, settings: Covariance) -> tuple[torch.Tensor, torch.Tensor]:
        """The covariance of a preset, and the mean to subtract.

        naive: the sample covariance. pooled: the average of the covariances of groups of consecutive windows, each
        around its own mean and weighted by its degrees of freedom (paper, Equation 5). uncentred: E[x x'], mean 0.

        Returns:
            n x n in float64; n in float64.

        Raises:
            RankwiseError: more groups than windows, or too few tokens.
        """
        covariance, means = self.covariance.double(), self.window_means.double()
        mean = means.mean(dim=0)
        if settings.estimator == "uncentred":
            return covariance + torch.outer(mean, mean), torch.zeros_like(mean)
        groups = settings.groups or 1
        if groups > means.shape[0]:
            raise RankwiseError(
                f"a covariance pooled over {groups} groups needs as many windows; there are {len(means)}"
            )
        if self.tokens <= groups:
            raise RankwiseError(f"{self.tokens} tokens are too few for a covariance within {groups} groups")
        parts = torch.tensor_split(means, groups)
        sizes = torch.tensor([[len(part) * self.window_length] for part in parts], dtype=torch.float64)
        deviations = torch.stack([part.mean(dim=0) for part in parts]) - mean
        between = (sizes * deviations).T @ deviations
        return (covariance * self.tokens - between) / (self.tokens - groups), mean

    def tensors(self, site: str) -> dict[str, torch.Tensor]:
        """As stored: the covariance in float32, the means in float64."""
        return {
            f"{site}.covariance": self.covariance.float(),
            f"{site}.window_means": self.window_means,
            f"{site}.absolute_mean": self.absolute_mean,
            f"{site}.window_length": torch.tensor(self.window_length),
        }

    @classmethod
    def from_tensors(cls, tensors: dict[str, torch.Tensor], site: str) -> Moments:
        """Read back what `tensors` wrote."""
        return cls(
            covariance=tensors[f"{site}.covariance"],
            window_means=tensors[f"{site}.window_means"],
            absolute_mean=tensors[f"{site}.absolute_mean"],
            window_length=int(tensors[f"{site}.window_length"]),
        )
