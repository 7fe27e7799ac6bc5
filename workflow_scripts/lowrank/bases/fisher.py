"""Bases that keep what the loss needs: principal directions in the metric of the loss gradient.

With C = Cov(y) of a layer's outputs and G = E[g g'] of the loss gradient there (`output_gradients`), an output error e
costs 1/2 tr(G Cov(e)). Let s = tr(G)/m and s M'M = G + eps diag(G). Among all affine maps of rank r the cost in that
metric is least for

    B = M^-1 V_r,   A = V_r' M W,   bias = mu - B A E[x],

where V_r are the top eigenvectors of M C M' (Eckart and Young, for M y), and it is s/2 times the sum of the other
eigenvalues. So the columns of M^-1 V are nested as principal directions are: every rank is a prefix. With G = I these
are the principal directions themselves. Any M will do; the one here is upper triangular, M' being Cholesky's factor.
The term with eps keeps directions in which no gradient was seen from being thrown away unlimited: G comes from a finite
sample. It is a share of each output's own E[g^2] (`damping`): with an output scaled by a and what reads it by 1/a the
network is the same, and so are its losses, and its factors but for that scale.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from lowrank.bases.damping import damped_cholesky
from lowrank.bases.principal import PrincipalBasis, means_of, output_directions, require_finite
from lowrank.errors import RankwiseError


def fisher_basis(
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    covariance: torch.Tensor,
    mean: torch.Tensor | None,
    gradient: torch.Tensor,
    damping: float,
    where: str,
) -> PrincipalBasis:
    """Compute the basis of one layer in float64, all min(m, n) directions of it.

    Args:
        weight: W, m x n.
        bias: b, m, or None.
        covariance: Cov(x), n x n.
        mean: mu_x, n; None for an uncentred estimate, whose pairs need no bias.
        gradient: G, m x m.
        damping: eps.
        where: the layer's name, for errors.

    Raises:
        RankwiseError: no gradient at all, a decomposition that fails or is not finite; the layer is named.
    """
    w = weight.double()
    cov, g = (tensor.double().to(w.device) for tensor in (covariance, gradient))
    scale = _scale(g, where)
    k = min(w.shape)
    try:
        root = damped_cholesky(g / scale, damping).T
        v, eigenvalues = output_directions(root @ w, cov)
        directions = torch.linalg.solve_triangular(root, v[:, :k], upper=True)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        raise RankwiseError(f"{where}: a decomposition of its covariance or gradient failed: {error}") from error
    eigenvalues = eigenvalues.clamp(min=0)[:k]
    projection = v[:, :k].T @ root @ w
    mean_output, projected_mean = means_of(w, bias, mean, projection)
    basis = PrincipalBasis(
        directions=directions,
        projection=projection,
        mean=mean_output,
        projected_mean=projected_mean,
        eigenvalues=eigenvalues,
        losses=eigenvalues * (scale / 2),
        orthonormal=False,
    )
    return require_finite(basis, where)


def _scale(gradient: torch.Tensor, where: str) -> float:
    """The mean square of the gradient at an output.

    Raises:
        RankwiseError: there is none; the layer is named.
    """
    scale = float(torch.trace(gradient)) / len(gradient)
    if not scale > 0:
        expert = ".experts." in where
        cure = ": no window of gradients led there, take more (`gradient_windows`)" * expert
        raise RankwiseError(f"{where}: the loss has no gradient at its output, so nothing says what to keep{cure}")
    return scale


def with_predicted_losses(basis: PrincipalBasis, gradient: torch.Tensor, where: str) -> PrincipalBasis:
    """A principal basis with the predicted cost of leaving out each of its directions.

    The outputs' coefficients along principal directions are uncorrelated, so the costs add up: leaving out direction
    u_i of variance l_i costs 1/2 l_i u_i' G u_i.

    Args:
        basis: orthonormal, of k directions.
        gradient: G, m x m.
        where: the layer's name, for errors.

    Raises:
        RankwiseError: no gradient at all, by which leaving out everything would cost nothing; the layer is named.
    """
    _scale(gradient, where)
    u = basis.directions.double()
    cost = (u * (gradient.double().to(u.device) @ u)).sum(dim=0)
    return replace(basis, losses=basis.eigenvalues[: u.shape[1]].double() * cost / 2)
