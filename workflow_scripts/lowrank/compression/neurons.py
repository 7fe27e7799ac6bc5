"""Which neurons of an MLP go, what that is predicted to cost, and how those that stay stand in for them.

With h (f) what the last matrix of an MLP reads, C = Cov(h), mu = E[h], W that matrix (d x f) and G = E[g g'] of the
loss gradient at its output, keep a set K of neurons and let them stand in for the others S by linear regression:

    W_K' = W_K + W_S C_SK C_KK^-1,   bias' = bias + W mu - W_K' mu_K,
    cost(S) = 1/2 tr(G W_S (C_SS - C_SK C_KK^-1 C_KS) W_S').

That is the least 1/2 tr(G Cov(e)) of all output errors e that affine maps of the kept neurons leave, in nats per token
as the predicted loss of a rank is (`bases.fisher`). C is damped by a share of each neuron's own variance, not of their
mean: one neuron may have a million times the variance of the others, and scaling a neuron must change nothing. G is
damped as for bases, G + eps diag(G).

The sets come from backward elimination (the optimal brain surgeon's step, Hassibi and Stork 1993, for whole columns).
With P = C_KK^-1, A = M W_K' and M'M = G, removing a set T of the kept neurons costs exactly
1/2 tr(A_T P_TT^-1 A_T') more, and then A -= A_T P_TT^-1 P_T:, P -= P_:T P_TT^-1 P_T:. The T are the few neurons that
cost least one by one. So the sets are nested, costs add up, and the first neuron is the best to remove alone; of later
sets only their cost is exact, not that no other set of this size costs less.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from lowrank.bases.damping import damped_cholesky
from lowrank.errors import RankwiseError

AT_ONCE = 8
"""Neurons removed between two looks at all costs. One by one, 1536 random neurons had the same curve within 0.04 % in
three times the time, on one CPU thread."""
DAMPING = 0.01
"""Share of each neuron's variance that is added to it."""


@dataclass(frozen=True)
class Elimination:
    """Backward elimination of the neurons of one block.

    Attributes:
        order: f indices, the first to go first.
        losses: f + 1 predicted rises of the mean loss, in nats per token, when the first 0, 1, ... f are gone.
    """

    order: torch.Tensor
    losses: torch.Tensor

    def kept(self, count: int) -> torch.Tensor:
        """The neurons that are left when all but so many are gone, in ascending order."""
        return self.order[len(self.order) - count :].sort().values


@dataclass(frozen=True)
class Neurons:
    """The neurons of one block as its last matrix sees them; in float64, each in units of its standard deviation.

    Attributes:
        weight: W, d x f, as it is.
        bias: of the last matrix, d, or None.
        mean: mu, f; None for an uncentred estimate, with which no bias is added.
        deviations: f standard deviations of the neurons; 0 for those that are constant.
        correlation: f x f with the damping on its diagonal; of a constant neuron there is nothing but that.
        root: M with scale M'M = damped G, d x d.
        scale: tr(G) / d.
        where: the layer's name, for errors.
    """

    weight: torch.Tensor
    bias: torch.Tensor | None
    mean: torch.Tensor | None
    deviations: torch.Tensor
    correlation: torch.Tensor
    root: torch.Tensor
    scale: float
    where: str

    @classmethod
    def of(
        cls,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        covariance: torch.Tensor,
        mean: torch.Tensor | None,
        gradient: torch.Tensor | None,
        gradient_damping: float,
        where: str,
        damping: float = DAMPING,
    ) -> Neurons:
        """Prepare a block; all is computed where `weight` is.

        Args:
            weight: W, d x f.
            bias: of the last matrix, d, or None.
            covariance: C, f x f.
            mean: mu, f; None for an uncentred estimate.
            gradient: G, d x d; None: the identity, so that costs are half the squares of output errors.
            gradient_damping: eps, share of each output's own value on G's diagonal that is added to it.
            where: the layer's name, for errors.
            damping: share of each neuron's variance that is added to it; more than 0 where neurons may be collinear.

        Raises:
            RankwiseError: no gradient at all, or values that are not finite; the layer is named.
        """
        w = weight.detach().double()
        c = covariance.double().to(w.device)
        g = torch.eye(len(w), dtype=w.dtype, device=w.device) if gradient is None else gradient.double().to(w.device)
        scale = float(torch.trace(g)) / len(g)
        if not bool(c.isfinite().all()) or not bool(w.isfinite().all()):
            raise RankwiseError(
                f"{where}: its weights or its statistics are damaged, they hold values that are no numbers"
            )
        if not scale > 0:
            raise RankwiseError(
                f"{where}: the loss has no gradient at its output, so nothing says which neurons to keep"
            )
        # Statistics are files of float32: below its normal numbers a covariance holds no correlation any more.
        moves = c.diagonal() > torch.finfo(torch.float32).tiny
        deviations = torch.where(moves, c.diagonal().sqrt(), 0.0)
        inverse = torch.where(moves, 1 / deviations, 0.0)
        correlation = (c + c.T) / 2 * inverse * inverse[:, None]
        correlation.diagonal().fill_(1 + damping)
        return cls(
            weight=w,
            bias=None if bias is None else bias.detach().double().to(w.device),
            mean=None if mean is None else mean.double().to(w.device),
            deviations=deviations,
            correlation=correlation,
            root=g if gradient is None else damped_cholesky(g / scale, gradient_damping).T,
            scale=scale,
            where=where,
        )

    def eliminate(self, at_once: int = AT_ONCE) -> Elimination:
        """Remove all neurons, those first that cost least.

        Args:
            at_once: how many go between two looks at all costs.

        Raises:
            RankwiseError: the damped covariance has no inverse, or loses it to rounding; the layer is named.
        """
        inverse = torch.cholesky_inverse(self._cholesky(self.correlation))
        weights = self.root @ (self.weight * self.deviations)
        held = torch.arange(len(inverse), device=inverse.device)  # the neurons of the rows that are worked on
        gone = torch.zeros_like(held, dtype=torch.bool)
        left, order, losses = len(held), [], [torch.zeros(1, dtype=torch.float64, device=held.device)]
        while left:
            if 2 * left <= len(held):  # rows of neurons that are gone hold nothing but zeros
                held, weights, inverse = held[~gone], weights[:, ~gone], inverse[~gone][:, ~gone]
                gone = torch.zeros_like(held, dtype=torch.bool)
            costs = (weights**2).sum(dim=0) / inverse.diagonal()
            cheapest = costs.masked_fill(gone, torch.inf).sort(stable=True).indices[: min(at_once, left)]
            root = self._cholesky(inverse[cheapest][:, cheapest])
            # P_TT = L L': column i of A_T L'^-1 is what the i-th of them costs when those before it are gone.
            apart = torch.linalg.solve_triangular(root, weights[:, cheapest].T, upper=False)
            rows = torch.linalg.solve_triangular(root, inverse[cheapest], upper=False)
            losses.append(losses[-1][-1] + self.scale / 2 * (apart**2).sum(dim=1).cumsum(dim=0))
            weights -= apart.T @ rows
            inverse -= rows.T @ rows
            gone[cheapest] = True
            order.append(held[cheapest])
            left -= len(cheapest)
        return Elimination(torch.cat(order).cpu(), torch.cat(losses).cpu())

    def refit(self, kept: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """What becomes of the last matrix when only some neurons stay.

        Args:
            kept: their indices, in ascending order.

        Returns:
            Weight, d x kept, and bias, d (None if there was none and the estimate has no mean), in float64.

        Raises:
            RankwiseError: the damped covariance of those that stay has no inverse; the layer is named.
        """
        kept = kept.to(self.weight.device)
        weight = self.weight[:, kept]
        if len(kept) == len(self.deviations):
            return weight, self.bias
        gone = torch.ones_like(self.deviations, dtype=torch.bool).index_fill_(0, kept, False)
        theirs = (self.weight * self.deviations)[:, gone] @ self.correlation[gone][:, kept]
        factor = self._cholesky(self.correlation[kept][:, kept])
        moves = self.deviations[kept] > 0  # a constant neuron stands in for nothing, the bias does
        taken = torch.cholesky_solve(theirs.T, factor).T / torch.where(moves, self.deviations[kept], 1)
        weight = weight + torch.where(moves, taken, 0)
        if self.mean is None:
            return weight, self.bias
        added = self.weight @ self.mean - weight @ self.mean[kept]
        return weight, added if self.bias is None else self.bias + added

    def _cholesky(self, matrix: torch.Tensor) -> torch.Tensor:
        try:
            root: torch.Tensor = torch.linalg.cholesky(matrix)
            return root
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            raise RankwiseError(
                f"{self.where}: the damped covariance of its inputs is not positive: {error}"
            ) from error
