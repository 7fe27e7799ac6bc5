"""Bases that keep what the loss needs: principal directions in the metric of the loss gradient.

With C = Cov(y) of a layer's outputs and G = E[g g'] of the loss gradient there (`output_gradients`), an output error e
costs 1/2 tr(G Cov(e)). Let M = (G + eps tr(G)/m I)^(1/2). Among all affine maps of rank r the cost is least for

    B = M^-1 V_r,   A = V_r' M W,   bias = mu - B V_r' M mu,

where V_r are the top eigenvectors of M C M (Eckart and Young, for M y), and the cost is half the sum of the other
eigenvalues. So the columns of M^-1 V are nested as principal directions are: every rank is a prefix. With G = I these
are the principal directions themselves. The term with eps keeps directions in which no gradient was seen from being
thrown away unlimited: G comes from a finite sample.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from lowrank.bases import PrincipalBasis, left_singular_vectors, require_finite
from lowrank.errors import RankwiseError


def fisher_basis(
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    covariance: torch.Tensor,
    mean: torch.Tensor,
    gradient: torch.Tensor,
    damping: float,
    where: str,
) -> PrincipalBasis:
    """Compute the basis of one layer in float64, all min(m, n) directions of it.

    Args:
        weight: W, m x n.
        bias: b, m, or None.
        covariance: Cov(x), n x n.
        mean: mu_x, n.
        gradient: G, m x m.
        damping: eps.
        where: the layer's name, for errors.

    Raises:
        RankwiseError: no gradient at all, a decomposition that fails or is not finite; the layer is named.
    """
    w = weight.double()
    cov, mu_x, g = (tensor.double().to(w.device) for tensor in (covariance, mean, gradient))
    if not float(torch.trace(g)) > 0:
        raise RankwiseError(f"{where}: the loss has no gradient at its output, so nothing says what to keep")
    try:
        root, inverse = root_and_inverse(g, damping)
        values, vectors = torch.linalg.eigh((cov + cov.T) / 2)
        v, eigenvalues = left_singular_vectors(root @ w @ (vectors * values.clamp(min=0).sqrt()))
    except RuntimeError as error:
        raise RankwiseError(f"{where}: a decomposition of its covariance or gradient failed: {error}") from error
    k = min(w.shape)
    v, eigenvalues = v[:, :k], eigenvalues.clamp(min=0)[:k]
    projection = v.T @ root @ w
    basis = PrincipalBasis(
        directions=inverse @ v,
        projection=projection,
        mean=w @ mu_x + (bias.double() if bias is not None else 0.0),
        projected_mean=projection @ mu_x,
        eigenvalues=eigenvalues,
        losses=eigenvalues / 2,
    )
    return require_finite(basis, where)


def with_predicted_losses(basis: PrincipalBasis, gradient: torch.Tensor) -> PrincipalBasis:
    """A principal basis with the predicted cost of leaving out each of its directions.

    The outputs' coefficients along principal directions are uncorrelated, so the costs add up: leaving out direction
    u_i of variance l_i costs 1/2 l_i u_i' G u_i.

    Args:
        basis: orthonormal, of k directions.
        gradient: G, m x m.
    """
    u = basis.directions.double()
    cost = (u * (gradient.double().to(u.device) @ u)).sum(dim=0)
    return replace(basis, losses=basis.eigenvalues[: u.shape[1]].double() * cost / 2)


def root_and_inverse(gradient: torch.Tensor, damping: float) -> tuple[torch.Tensor, torch.Tensor]:
    """M = (G + eps tr(G)/m I)^(1/2) and its inverse, both m x m and symmetric, in float64."""
    m = gradient.shape[0]
    shift = damping * torch.trace(gradient) / m
    values, vectors = torch.linalg.eigh((gradient + gradient.T) / 2)
    root = (values.clamp(min=0) + shift).sqrt()
    return (vectors * root) @ vectors.T, (vectors / root) @ vectors.T
