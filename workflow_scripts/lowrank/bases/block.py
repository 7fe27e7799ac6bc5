"""The bases of one block, as its preset wants them: principal, principal with predicted losses, or Fisher-weighted."""

from __future__ import annotations

from collections.abc import Container, Mapping
from typing import Any

import torch
from torch import nn

from lowrank.bases.fisher import fisher_basis, with_predicted_losses
from lowrank.bases.principal import PrincipalBasis, principal_basis
from lowrank.calibration.moments import Moments
from lowrank.config.presets import Covariance
from lowrank.errors import RankwiseError
from lowrank.model.families import Family, LinearType

Linears = dict[str, tuple[str, torch.Tensor, torch.Tensor | None]]
"""Key of a type -> (input site, weight, bias)."""


def linears_of(block: nn.Module, family: Family, sites: Container[str]) -> Linears:
    """The linear layers of a block that read one of some input sites: without experts that have no statistics."""
    there: dict[LinearType, Any] = {
        linear: block.get_submodule(linear.path) for linear in family.types if linear.site in sites
    }
    return {linear.key: (linear.site, layer.weight, layer.bias) for linear, layer in there.items()}


def bases_of_block(
    linears: Linears,
    moments: dict[str, Moments],
    settings: Covariance,
    device: torch.device,
    where: str,
    gradients: Mapping[str, torch.Tensor] | None = None,
) -> dict[str, torch.Tensor]:
    """The bases of all linear layers of a block, as tensors to store.

    Args:
        linears: those of the block.
        moments: input site -> its moments.
        settings: which estimate of the covariance.
        device: where to compute.
        where: the block's name, for errors.
        gradients: key of a type -> second moment of the loss gradient at its output, where the settings use it.

    Raises:
        RankwiseError: too few windows for the estimate, or a decomposition that fails; the layer is named.
    """
    estimates = {site: estimate(moment, settings, f"{where}, {site}") for site, moment in moments.items()}
    stored: dict[str, torch.Tensor] = {}
    for name, (site, weight, bias) in linears.items():
        covariance, mean = estimates[site]
        on_device = None if bias is None else bias.to(device)
        gradient = None if gradients is None else gradients[name].to(device)
        basis = basis_of(weight.to(device), on_device, covariance, mean, gradient, settings, f"{where}, {name}")
        stored |= basis.tensors(name)
    return stored


def basis_of(
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    covariance: torch.Tensor,
    mean: torch.Tensor | None,
    gradient: torch.Tensor | None,
    settings: Covariance,
    where: str,
) -> PrincipalBasis:
    """The basis of one layer, as its preset wants it.

    Args:
        weight: W, m x n, on the device where to compute.
        bias: b, m, or None.
        covariance: of its input, n x n.
        mean: of its input, n; None for an uncentred estimate.
        gradient: second moment of the loss gradient at its output, m x m, where the settings use it.
        settings: which estimate this is, and what gradients are for.
        where: the layer's name, for errors.

    Raises:
        RankwiseError: a decomposition that fails; the layer is named.
    """
    if gradient is not None and settings.gradients == "weigh":
        return fisher_basis(weight, bias, covariance, mean, gradient, settings.damping, where)
    every = settings.holds_all_directions
    basis = principal_basis(weight, bias, covariance, mean, where, all_directions=every)
    return basis if gradient is None else with_predicted_losses(basis, gradient, where)


def estimate(moments: Moments, settings: Covariance, where: str) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The covariance and the mean; None in place of a mean that is not subtracted.

    Raises:
        RankwiseError: too few windows for the estimate; `where` is named.
    """
    try:
        covariance, mean = moments.estimate(settings)
    except RankwiseError as error:
        raise RankwiseError(f"{where}: {error}") from error
    return covariance, mean if settings.centred else None
