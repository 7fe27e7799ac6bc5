"""What leaving out a direction changes of the loss, to first order in the weights.

A pair's product is a sum of terms, W = sum_i b_i a_i', and a smaller rank leaves out the last of them. With g the
gradient of the loss at W, leaving out term i changes the loss by

    delta_i = -b_i' g a_i.

ZS-SVD writes it with the decomposition W S = U E V' of the whitened matrix (S S' = E[x x']), where b_i = u_i and
a_i' = u_i' W, as -e_i u_i' g S^-T v_i: minus a singular value times the derivative of the loss by it. Both are the
same, since a_i = e_i S^-T v_i, and here nothing is inverted.
"""

from __future__ import annotations

import torch

from lowrank.bases.principal import PrincipalBasis


def loss_changes(basis: PrincipalBasis, gradient: torch.Tensor) -> torch.Tensor:
    """The change of the loss on leaving out each direction, k values in float64.

    Args:
        basis: of an uncentred estimate: a centred one moves the bias along, which this does not see.
        gradient: of the loss by the weight, m x n.
    """
    b, a = basis.directions.double(), basis.projection.double()
    return -((b.T @ gradient.to(b.device).double()) * a).sum(dim=1)
