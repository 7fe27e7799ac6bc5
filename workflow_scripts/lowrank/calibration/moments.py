"""First and second moments of a layer's inputs, from one pass, for every estimate of the covariance.

Stored per input site: the covariance within windows, and the mean of each window. Any other covariance follows by
adding the scatter between the means of windows that lie in one group, so a new number of groups needs no new pass.
Nothing is ever subtracted, so no digits are lost, however far the windows' means lie apart.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, fields

import torch

from lowrank.calibration.gram import add_gram, add_gram_in_parts, packed, prefers_parts, symmetric, unpacked
from lowrank.config.presets import Covariance
from lowrank.errors import RankwiseError
from lowrank.jobs.share import Share


def check_finite(values: torch.Tensor, what: str) -> None:
    """Stop at infinities and NaN in what flows through a model.

    Raises:
        RankwiseError: with `what` as its subject, which names the layer.
    """
    if not bool(values.isfinite().all()):
        raise RankwiseError(
            f"{what} are not finite. Set `dtype: float32` for this model in the config; "
            "if it is float32 already, the weights are damaged."
        )


class MomentAccumulator:
    """Running moments of n features over windows of equal length.

    Products of deviations from the window's own mean are formed in float32 (float64 for float64 inputs), batch by
    batch, and added up in float64; on a GPU those of a 16-bit model from pairs of 16-bit parts.
    """

    def __init__(self, features: int, device: torch.device | str = "cpu") -> None:
        self.scatter = torch.zeros(features, features, dtype=torch.float64, device=device)
        self.absolute = torch.zeros(features, dtype=torch.float64, device=device)
        self.window_means: list[torch.Tensor] = []
        self.window_length = 0

    def update(self, inputs: torch.Tensor, where: str) -> None:
        """Add a batch of windows: b x length x n.

        Raises:
            RankwiseError: values that are not finite; `where` names the layer.
        """
        x = inputs.detach().to(torch.promote_types(inputs.dtype, torch.float32))
        check_finite(x, f"{where}: inputs")
        assert self.window_length in (0, x.shape[1]), "windows of different lengths"
        self.window_length = x.shape[1]
        means = x.mean(dim=1, dtype=torch.float64)
        deviations = (x - means[:, None].to(x.dtype)).flatten(0, 1)
        self._add_gram(deviations, inputs)
        self.absolute += x.abs().sum(dim=(0, 1), dtype=torch.float64)
        self.window_means.append(means)

    def _add_gram(self, deviations: torch.Tensor, inputs: torch.Tensor) -> None:
        """Add deviations' transpose times themselves, as fast as the dtype and device of the inputs allow."""
        add = add_gram_in_parts if prefers_parts(inputs) else add_gram
        add(self.scatter, deviations)

    def add_up(self, share: Share, first: int, windows: int, length: int) -> None:
        """Put together what several processes saw, each its own windows; all of them must call it.

        Args:
            share: this process among them.
            first: of all windows, the first that this process saw.
            windows: of all processes together.
            length: of a window, tokens.
        """
        if share.world == 1:
            return
        share.sum(self.scatter)
        share.sum(self.absolute)
        means = self.scatter.new_zeros(windows, len(self.absolute))
        if self.window_means:
            seen = torch.cat(self.window_means)
            means[first : first + len(seen)] = seen
        self.window_means, self.window_length = [share.sum(means)], length

    def result(self) -> Moments:
        """The moments of everything seen so far."""
        assert self.window_means, "no window was added"
        means = torch.cat(self.window_means)
        tokens = means.shape[0] * self.window_length
        return Moments(
            within=symmetric(self.scatter) / tokens,
            window_means=means,
            absolute_mean=self.absolute / tokens,
            window_length=self.window_length,
        )


class RoutedAccumulator(MomentAccumulator):
    """The same of an expert's inputs: as many of a window's tokens as are routed to it, which may be none."""

    def __init__(self, features: int, device: torch.device | str = "cpu") -> None:
        super().__init__(features, device)
        self.window_tokens: list[torch.Tensor] = []

    @property
    def tokens(self) -> int:
        """Tokens seen."""
        return sum(int(counts.sum()) for counts in self.window_tokens)

    def update_routed(self, inputs: torch.Tensor, windows: torch.Tensor, count: int, where: str) -> None:
        """Add the tokens of a batch of windows.

        Args:
            inputs: t x n.
            windows: t, which window of the batch each token is of.
            count: windows in the batch.
            where: the layer's name, for errors.

        Raises:
            RankwiseError: values that are not finite; the layer is named.
        """
        x = inputs.detach().to(torch.promote_types(inputs.dtype, torch.float32))
        check_finite(x, f"{where}: inputs")
        counts = windows.bincount(minlength=count)
        sums = self.scatter.new_zeros(count, x.shape[1]).index_add_(0, windows, x.double())
        means = sums / counts.clamp(min=1)[:, None]
        self._add_gram(x - means[windows].to(x.dtype), inputs)
        self.absolute += x.abs().sum(dim=0, dtype=torch.float64)
        self.window_means.append(means)
        self.window_tokens.append(counts)

    def pass_over(self, count: int) -> None:
        """Add a batch of so many windows, none of whose tokens the expert got."""
        self.window_means.append(self.scatter.new_zeros(count, len(self.absolute)))
        self.window_tokens.append(torch.zeros(count, dtype=torch.int64, device=self.scatter.device))

    def add_up(self, share: Share, first: int, windows: int, length: int) -> None:
        """As of `MomentAccumulator`; whatever the windows' length, each has its own number of tokens."""
        if share.world == 1:
            return
        super().add_up(share, first, windows, length)
        counts = torch.zeros(windows, dtype=torch.int64, device=self.scatter.device)
        if self.window_tokens:
            seen = torch.cat(self.window_tokens)
            counts[first : first + len(seen)] = seen
        self.window_tokens = [share.sum(counts)]

    def result(self) -> Moments:
        """The moments of everything seen so far: at least one token."""
        assert self.tokens, "no token was added"
        return Moments(
            within=symmetric(self.scatter) / self.tokens,
            window_means=torch.cat(self.window_means),
            absolute_mean=self.absolute / self.tokens,
            window_length=torch.cat(self.window_tokens),
        )


@dataclass(frozen=True)
class Moments:
    """Moments of one input site.

    Attributes:
        within: n x n, covariance of the tokens around the mean of their window, divided by the number of tokens.
        window_means: w x n, mean of each window, in the order of the calibration file; of one without tokens, zero.
        absolute_mean: n, mean of |x|.
        window_length: tokens in a window; of an expert's inputs w numbers, of the tokens that were routed to it.
    """

    within: torch.Tensor
    window_means: torch.Tensor
    absolute_mean: torch.Tensor
    window_length: int | torch.Tensor

    @property
    def tokens(self) -> int:
        """Tokens seen."""
        length = self.window_length
        return int(length.sum()) if isinstance(length, torch.Tensor) else len(self.window_means) * length

    @property
    def mean(self) -> torch.Tensor:
        """n, over all tokens, in float64."""
        return self._weighted(self.window_means.double())

    def _weighted(self, values: torch.Tensor, windows: slice = slice(None)) -> torch.Tensor:
        """Mean over the tokens of some windows of what is given for each window, k x n; 0 where there are none."""
        if not isinstance(self.window_length, torch.Tensor):
            return values.mean(dim=0)
        counts = self.window_length[windows].to(values)
        return (counts @ values) / counts.sum().clamp(min=1)

    def estimate(self, settings: Covariance) -> tuple[torch.Tensor, torch.Tensor]:
        """The covariance of a preset, and the mean to subtract.

        naive: the sample covariance, sum (x - mean)(x - mean)' / (N - 1).
        pooled: the covariance within G groups of consecutive windows (paper, Equation 5): the average of the groups'
        sample covariances C_g weighted by their degrees of freedom, sum (n_g - 1) C_g / (N - G). With groups of equal
        size this is the plain average (1/G) sum C_g. If G does not divide the windows, the first groups have one
        window more, and no window is left out. Groups in which an expert got no token are none of its G.
        uncentred: E[x x'], and the mean 0.

        Returns:
            n x n in float64; n in float64.

        Raises:
            RankwiseError: more groups than windows, or too few tokens.
        """
        means = self.window_means.double()
        if settings.estimator == "uncentred":
            return self._around(torch.zeros_like(means)), torch.zeros_like(self.mean)
        groups = settings.groups or 1
        if groups > len(means):
            raise RankwiseError(
                f"a covariance pooled over {groups} groups needs as many windows; there are {len(means)}"
            )
        parts = self._parts(groups)
        seen = sum(self._any_token(part) for part in parts)
        if self.tokens <= seen:
            raise RankwiseError(f"{self.tokens} tokens are too few for a covariance within {seen} groups")
        centres = torch.cat([self._weighted(means[part], part).expand_as(means[part]) for part in parts])
        return self._around(centres) * (self.tokens / (self.tokens - seen)), self.mean

    def _parts(self, groups: int) -> list[slice]:
        """The windows of each group."""
        ends = [len(part) for part in torch.tensor_split(torch.empty(len(self.window_means)), groups)]
        return [slice(stop - size, stop) for size, stop in zip(ends, itertools.accumulate(ends), strict=True)]

    def _any_token(self, windows: slice) -> bool:
        return not isinstance(self.window_length, torch.Tensor) or bool(self.window_length[windows].any())

    def _around(self, centres: torch.Tensor) -> torch.Tensor:
        """Mean square deviation of all tokens from the centre (w x n) of their window, n x n in float64."""
        deviations = self.window_means.double() - centres
        if not isinstance(self.window_length, torch.Tensor):
            return self.within.double() + deviations.T @ deviations / len(deviations)
        weights = self.window_length.to(deviations)[:, None] / self.tokens
        return self.within.double() + deviations.T @ (deviations * weights)

    def tensors(self, site: str) -> dict[str, torch.Tensor]:
        """As stored: the covariance packed and in float32, the means in float64."""
        return {
            f"{site}.within": packed(self.within.float()),
            f"{site}.window_means": self.window_means,
            f"{site}.absolute_mean": self.absolute_mean,
            f"{site}.window_length": torch.as_tensor(self.window_length),
        }

    @staticmethod
    def names(site: str) -> list[str]:
        """Names of the stored tensors."""
        return [f"{site}.{field.name}" for field in fields(Moments)]

    @classmethod
    def from_tensors(cls, tensors: dict[str, torch.Tensor], site: str) -> Moments:
        """Read back what `tensors` wrote."""
        length = tensors[f"{site}.window_length"]
        return cls(
            within=unpacked(tensors[f"{site}.within"]),
            window_means=tensors[f"{site}.window_means"],
            absolute_mean=tensors[f"{site}.absolute_mean"],
            window_length=length if length.dim() else int(length),
        )
