"""Principal bases of the outputs of each linear layer (paper, Section 3.1).

Eigenvectors are sorted by eigenvalue, so the factors of every rank are prefixes of what is stored here:
for y = W x + b with mean mu and top eigenvectors U_r of Cov(y),

    A = U_r' W,   B = U_r,   bias = mu - U_r (U_r' W mu_x),

which maps x to mu + U_r U_r' (y - mu). Without a mean to subtract, the bias is the layer's own, or none.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from lowrank.errors import RankwiseError
from lowrank.files import layer_files
from lowrank.manifest import load_layer
from lowrank.model.factors import LowRankFactors
from lowrank.ranks.budget import largest_rank


@dataclass(frozen=True)
class PrincipalBasis:
    """The basis of one linear layer, up to the largest rank k that saves parameters, or further.

    Attributes:
        directions: U, m x k, orthonormal columns by decreasing variance (of a Fisher basis: M^-1 V, see
            `bases.fisher`; then read V' M for U').
        projection: U' W, k x n.
        mean: mu, m: the mean output; for an uncentred estimate the layer's own bias, None if it has none.
        projected_mean: U' W mu_x, k; None for an uncentred estimate.
        eigenvalues: all min(m, n) variances, decreasing.
        losses: k, by how much the mean loss per token is predicted to rise when a direction is left out; None if no
            gradients were collected.
        orthonormal: whether `projection` is the product of directions and weights, which is not stored then.
    """

    directions: torch.Tensor
    projection: torch.Tensor
    mean: torch.Tensor | None
    projected_mean: torch.Tensor | None
    eigenvalues: torch.Tensor
    losses: torch.Tensor | None = None
    orthonormal: bool = True

    def factors(self, rank: int) -> LowRankFactors:
        """The low-rank pair of a rank.

        Raises:
            RankwiseError: the rank is beyond what is stored.
        """
        if not 1 <= rank <= self.directions.shape[1]:
            raise RankwiseError(f"rank {rank} is not within 1 to {self.directions.shape[1]}, what the basis holds")
        up = self.directions[:, :rank]
        return LowRankFactors(self.projection[:rank], up, bias_of(self.mean, self.projected_mean, up))

    def tensors(self, name: str) -> dict[str, torch.Tensor]:
        """As stored, in float32."""
        fields = [field for field in (*FIELDS, *OPTIONAL) if not (field == "projection" and self.orthonormal)]
        there = {field: tensor for field in fields if (tensor := getattr(self, field)) is not None}
        return {f"{name}.{field}": tensor.float() for field, tensor in there.items()}


def bias_of(mean: torch.Tensor | None, projected_mean: torch.Tensor | None, up: torch.Tensor) -> torch.Tensor | None:
    """The bias of a pair, from the two means of its basis and its directions U_r, m x r."""
    if mean is None or projected_mean is None:
        return mean
    return mean - up @ projected_mean[: up.shape[1]]


def means_of(
    w: torch.Tensor, bias: torch.Tensor | None, mean: torch.Tensor | None, projection: torch.Tensor
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """`mean` and `projected_mean` of a basis.

    Args:
        w: W, m x n, in float64.
        bias: b, m, or None.
        mean: mu_x, n, or None for an uncentred estimate.
        projection: U' W, k x n.
    """
    if mean is None:
        return None if bias is None else bias.double(), None
    mu_x = mean.double().to(w.device)
    return w @ mu_x + (bias.double() if bias is not None else 0.0), projection @ mu_x


def principal_basis(
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    covariance: torch.Tensor,
    mean: torch.Tensor | None,
    where: str,
    all_directions: bool = False,
) -> PrincipalBasis:
    """Compute the basis of one layer in float64.

    Args:
        weight: W, m x n.
        bias: b, m, or None.
        covariance: Cov(x), n x n.
        mean: mu_x, n; None for an uncentred estimate, whose pairs need no bias.
        where: the layer's name, for errors.
        all_directions: hold min(m, n) directions, for pairs that save parameters beyond the break-even rank.

    Raises:
        RankwiseError: the decomposition fails or is not finite; the layer is named.
    """
    w = weight.double()
    m, n = w.shape
    cov = covariance.double().to(w.device)
    try:
        u, eigenvalues = output_directions(w, cov)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        raise RankwiseError(f"{where}: the eigendecomposition of its output covariance failed: {error}") from error
    k = min(m, n) if all_directions else largest_rank(m, n)
    u = u[:, :k]
    projection = u.T @ w
    mean_output, projected_mean = means_of(w, bias, mean, projection)
    basis = PrincipalBasis(
        directions=u,
        projection=projection,
        mean=mean_output,
        projected_mean=projected_mean,
        eigenvalues=eigenvalues.clamp(min=0)[: min(m, n)],
    )
    return require_finite(basis, where)


def require_finite(basis: PrincipalBasis, where: str) -> PrincipalBasis:
    """The basis itself.

    Raises:
        RankwiseError: something in it is not finite; `where` names the layer.
    """
    if not all(bool(tensor.isfinite().all()) for tensor in (basis.projection, *basis.tensors("").values())):
        raise RankwiseError(f"{where}: its basis is not finite; its weights or its statistics are damaged")
    return basis


def output_directions(w: torch.Tensor, cov: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Eigenvectors of W C W' in columns by decreasing eigenvalue, and the eigenvalues; n of them if m > n, else m."""
    return _wide(w, cov) if w.shape[0] > w.shape[1] else _narrow(w, cov)


def _narrow(w: torch.Tensor, cov: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Eigenvectors of the m x m covariance W C W'."""
    output = w @ cov @ w.T
    eigenvalues, vectors = torch.linalg.eigh((output + output.T) / 2)
    return fix_signs(vectors.flip(1)), eigenvalues.flip(0)


def _wide(w: torch.Tensor, cov: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The same when m > n, without the m x m matrix: with C = S S', those are the left vectors of W S."""
    values, vectors = torch.linalg.eigh((cov + cov.T) / 2)
    return left_singular_vectors(w @ (vectors * values.clamp(min=0).sqrt()))


def left_singular_vectors(matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Left singular vectors of an m x n matrix by decreasing singular value, and the squares of those.

    They come from the smaller of the two Gram matrices, which takes a tenth of the time of a decomposition. If that is
    the right one, G = V D V', the columns of (matrix V) are orthogonal but lose that where D is tiny; a QR
    decomposition restores it and keeps the span of each prefix.
    """
    m, n = matrix.shape
    if m <= n:
        eigenvalues, vectors = torch.linalg.eigh(matrix @ matrix.T)
        return fix_signs(vectors.flip(1)), eigenvalues.flip(0)
    eigenvalues, vectors = torch.linalg.eigh(matrix.T @ matrix)
    u, _ = torch.linalg.qr(matrix @ vectors.flip(1))
    return fix_signs(u), eigenvalues.flip(0)


def fix_signs(vectors: torch.Tensor) -> torch.Tensor:
    """Turn each column so that its largest entry is positive: one basis, whatever the solver's signs."""
    rows = vectors.abs().argmax(dim=0, keepdim=True)
    signs = vectors.gather(0, rows).sign()
    return vectors * torch.where(signs == 0, torch.ones_like(signs), signs)


FIELDS = ("directions", "eigenvalues")
OPTIONAL = ("projection", "mean", "projected_mean", "losses")
"""Fields of a basis that its file may lack."""


def load_basis(tensors: dict[str, torch.Tensor], name: str, weight: torch.Tensor) -> PrincipalBasis:
    """The basis of one layer from a block's tensors, by the key of its type.

    Args:
        tensors: of the block's file.
        name: the key of the layer's type.
        weight: W, m x n, of the dense layer. Where the file has no `projection`, it is multiplied in float32 on this
            tensor's device.
    """
    directions, projection = tensors[f"{name}.directions"], tensors.get(f"{name}.projection")
    orthonormal = projection is None
    if projection is None:
        projection = directions.to(weight.device).T @ weight.to(directions.dtype)
    return PrincipalBasis(
        directions=directions,
        projection=projection,
        mean=tensors.get(f"{name}.mean"),
        projected_mean=tensors.get(f"{name}.projected_mean"),
        eigenvalues=tensors[f"{name}.eigenvalues"],
        losses=tensors.get(f"{name}.losses"),
        orthonormal=orthonormal,
    )


class Bases:
    """The bases of a model, read block by block when they are asked for.

    Attributes:
        files: one file per block, in order.
    """

    def __init__(self, folder: str | Path, layers: int) -> None:
        self.files = layer_files(folder, layers)
        self._loaded: tuple[int, dict[str, torch.Tensor]] | None = None

    def of(self, layer: int, key: str, weight: torch.Tensor) -> PrincipalBasis:
        """The basis of a layer of a block, by the key of its type.

        Args:
            layer: number of the block.
            key: of the layer's type.
            weight: W, m x n, of the dense layer, see `load_basis`.

        Raises:
            RankwiseError: the block's file is damaged, or was made for something else.
        """
        tensors = self._basis(layer, key)
        length, variances = len(tensors[f"{key}.directions"]), len(tensors[f"{key}.eigenvalues"])
        if (length, variances) != (len(weight), min(weight.shape)):
            raise RankwiseError(
                f"{self.files[layer]}: its basis of '{key}' has directions of {length} numbers and {variances} "
                f"eigenvalues, and the layer's weight is {' x '.join(map(str, weight.shape))}, so it was made for "
                f"something else. Delete {self.files[layer].parent} and run the workflow again."
            )
        return load_basis(tensors, key, weight)

    def losses(self, layer: int, key: str) -> torch.Tensor | None:
        """Those of the basis of a layer of a block, k, which need no weights.

        Raises:
            RankwiseError: as of `of`.
        """
        return self._basis(layer, key).get(f"{key}.losses")

    def _basis(self, layer: int, key: str) -> dict[str, torch.Tensor]:
        """The tensors of a block, among them a basis of this type."""
        tensors = self._block(layer)
        if any(f"{key}.{field}" not in tensors for field in FIELDS):
            raise RankwiseError(
                f"{self.files[layer]}: holds no basis of '{key}', so it was made for something else. Delete "
                f"{self.files[layer].parent} and run the workflow again."
            )
        return tensors

    @property
    def centred(self) -> bool:
        """Whether a mean was subtracted, so that the pair of every layer has a bias."""
        return any(name.endswith(".projected_mean") for name in self._block(0))

    def _block(self, layer: int) -> dict[str, torch.Tensor]:
        if self._loaded is None or self._loaded[0] != layer:
            self._loaded = layer, load_layer(self.files[layer])
        return self._loaded[1]
