"""The MLP of one block with fewer neurons: its layers, and the bases of these.

Neurons go as `neurons` has it, and what is left are plain matrices: rows of the first ones, and the last one refitted.
Their bases come from the covariance, the mean and the gradients of the neurons that stay.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from lowrank.bases.block import basis_of, estimate
from lowrank.bases.principal import PrincipalBasis
from lowrank.calibration.moments import Moments
from lowrank.compression.neurons import Neurons
from lowrank.config.presets import Covariance
from lowrank.model.families import LinearModule
from lowrank.model.stored_blocks import Layer as DenseLayer


@dataclass(frozen=True)
class Layer:
    """A linear layer of the neurons that are left, in float64; `module` has its shape."""

    module: LinearModule
    weight: torch.Tensor
    bias: torch.Tensor | None


class NarrowBlock:
    """The MLP of one block, with all that calibration says of it.

    Attributes:
        modules: its dense linear layers; the last of them is the one that reads neurons.
        neurons: as that one sees them.
    """

    def __init__(
        self,
        modules: Sequence[LinearModule],
        dense: Sequence[DenseLayer],
        moments: Mapping[str, Moments],
        gradients: Mapping[str, torch.Tensor],
        settings: Covariance,
        device: torch.device,
    ) -> None:
        """Read a block's weights and statistics onto a device, where all is computed.

        Args:
            modules: the linear layers of the block's MLP, in the order of the forward pass.
            dense: weight and bias of each.
            moments: input site -> its moments.
            gradients: type -> second moment of the loss gradient at its output.
            settings: how covariances are estimated, and bases made.
            device: where to compute.

        Raises:
            RankwiseError: too few windows, damaged numbers, or no gradient; the layer is named.
        """
        self.modules, self._gradients, self._settings, self._device = list(modules), gradients, settings, device
        self._weights = [weight.detach().to(device).double() for weight, _ in dense]
        self._biases = [bias for _, bias in dense]
        self._inputs = []
        for module in (self.modules[0], self.modules[-1]):
            covariance, mean = estimate(moments[module.type.site], settings, module.name)
            self._inputs.append((covariance.to(device), None if mean is None else mean.to(device)))
        last = self.modules[-1]
        gradient, damping = self._gradient_at(last), settings.damping
        self.neurons = Neurons.of(self._weights[-1], self._biases[-1], *self._inputs[1], gradient, damping, last.name)

    def parts(self, kept: torch.Tensor) -> list[Layer]:
        """The layers of the neurons that stay.

        Args:
            kept: their indices, in ascending order.
        """
        parts = []
        on_device = kept.to(self._device)
        for module, weight, bias in zip(self.modules[:-1], self._weights, self._biases, strict=False):
            left = None if bias is None else bias.detach().to(weight)[on_device]
            parts.append(Layer(narrow(module, self.modules[-1], len(kept)), weight[on_device], left))
        return [*parts, Layer(narrow(self.modules[-1], self.modules[-1], len(kept)), *self.neurons.refit(kept))]

    def basis(self, part: Layer, kept: torch.Tensor) -> PrincipalBasis:
        """The basis of one of the `parts`.

        Raises:
            RankwiseError: a decomposition that fails; the layer is named.
        """
        module = part.module
        kept, gradient = kept.to(self._device), self._gradient_at(module)
        covariance, mean = self._inputs[0]
        if module.type == self.modules[-1].type:
            covariance, mean = self._inputs[1]
            covariance, mean = covariance[kept][:, kept], None if mean is None else mean[kept]
        else:
            gradient = gradient[kept][:, kept]
        return basis_of(part.weight, part.bias, covariance, mean, gradient, self._settings, module.name)

    def _gradient_at(self, module: LinearModule) -> torch.Tensor:
        return self._gradients[module.type.name].to(self._device).double()


def narrow(module: LinearModule, reader: LinearModule, neurons: int) -> LinearModule:
    """A layer of an MLP with so many neurons: of its columns if it is the one that reads them, else of its rows."""
    if module.type == reader.type:
        return replace(module, in_features=neurons)
    return replace(module, out_features=neurons)
