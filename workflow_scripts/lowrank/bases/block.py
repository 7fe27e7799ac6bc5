"""The bases of one block, as its preset wants them: principal, principal with predicted losses, or Fisher-weighted."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from lowrank.bases.fisher import fisher_basis, with_predicted_losses
from lowrank.bases.principal import principal_basis
from lowrank.calibration.moments import Moments
from lowrank.config.presets import Covariance
from lowrank.errors import RankwiseError


def bases_of_block(
    linears: dict[str, tuple[str, torch.Tensor, torch.Tensor | None]],
    moments: dict[str, Moments],
    settings: Covariance,
    device: torch.device,
    where: str,
    gradients: Mapping[str, torch.Tensor] | None = None,
) -> dict[str, torch.Tensor]:
    """The bases of all linear layers of a block, as tensors to store.

    Args:
        linears: type -> (input site, weight, bias).
        moments: input site -> its moments.
        settings: which estimate of the covariance.
        device: where to compute.
        where: the block's name, for errors.
        gradients: type -> second moment of the loss gradient at its output, where the settings use it.

    Raises:
        RankwiseError: too few windows for the estimate, or a decomposition that fails; the layer is named.
    """
    estimates = {site: _estimate(moment, settings, f"{where}, {site}") for site, moment in moments.items()}
    stored: dict[str, torch.Tensor] = {}
    for name, (site, weight, bias) in linears.items():
        covariance, mean = estimates[site]
        on_device = None if bias is None else bias.to(device)
        layer = f"{where}, {name}"
        if gradients is not None and settings.gradients == "weigh":
            gradient = gradients[name].to(device)
            basis = fisher_basis(weight.to(device), on_device, covariance, mean, gradient, settings.damping, layer)
        else:
            every = settings.holds_all_directions
            basis = principal_basis(weight.to(device), on_device, covariance, mean, layer, all_directions=every)
            if gradients is not None:
                basis = with_predicted_losses(basis, gradients[name])
        stored |= basis.tensors(name)
    return stored


def _estimate(moments: Moments, settings: Covariance, where: str) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The covariance and the mean; None in place of a mean that is not subtracted."""
    try:
        covariance, mean = moments.estimate(settings)
    except RankwiseError as error:
        raise RankwiseError(f"{where}: {error}") from error
    return covariance, mean if settings.centred else None
