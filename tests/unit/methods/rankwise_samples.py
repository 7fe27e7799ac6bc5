"""Bases with predicted losses of tiny models, and a tiny model that has learnt something."""

from __future__ import annotations

import copy
import tempfile
from functools import cache
from pathlib import Path

import torch
from transformers import PreTrainedModel

from lowrank.bases.block import bases_of_block
from lowrank.bases.principal import Bases
from lowrank.calibration.output_gradients import OutputGradients, collect_output_gradients, load_output_gradients
from lowrank.calibration.statistics import Statistics, collect_statistics, load_moments
from lowrank.compression.eliminate_neurons import Eliminations, eliminate_neurons
from lowrank.config.presets import Covariance
from lowrank.files import layer_name, save_tensors
from lowrank.jobs.state import Parts
from lowrank.model.checkpoint import family_of
from lowrank.ranks.budget import Budget
from tests import tiny
from tests.unit.model.factor_samples import CPU, TOKENS, layers_in, shape_of

_FOLDER = tempfile.TemporaryDirectory(prefix="rankwise-samples-")
_LENGTH, _STEPS = 32, 150


def bases_of(model: PreTrainedModel, kind: str, tokens: torch.Tensor, settings: Covariance) -> Bases:
    """The bases of a tiny model by the library's own stages."""
    folder = Path(tempfile.mkdtemp(dir=_FOLDER.name))
    moments = collect_statistics(model, tokens, 2, folder / "statistics", CPU)
    gradients = collect_output_gradients(model, tokens, 2, folder / "gradients", CPU)
    family, layers = family_of(model), shape_of(kind).layers
    for layer in range(layers):
        block = model.get_submodule(f"{family.blocks}.{layer}")
        modules = {linear: block.get_submodule(linear.path) for linear in family.types}
        linears = {linear.name: (linear.site, module.weight, module.bias) for linear, module in modules.items()}
        stored = bases_of_block(
            linears,
            load_moments(moments[layer], family.sites),
            settings,
            CPU,
            f"block {layer}",
            load_output_gradients(gradients[layer], linears) if settings.gradients != "none" else None,
        )
        save_tensors(folder / "bases" / layer_name(layer), stored)
    return Bases(folder / "bases", layers)


def eliminations_of(
    model: PreTrainedModel,
    kind: str,
    calibrated: tuple[Statistics, OutputGradients],
    settings: Covariance,
    multiple: int,
) -> Eliminations:
    """What removing neurons of a tiny model costs, with pairs at multiples, by the library's own stage."""
    folder, shape = Path(tempfile.mkdtemp(dir=_FOLDER.name)), shape_of(kind)
    parts = Parts(folder / "layers")
    eliminate_neurons(layers_in(model), Budget.of(shape), *calibrated, settings, CPU, parts, multiple)
    return Eliminations(folder / "layers", shape.layers)


@cache
def fisher_bases(kind: str, gradients: str = "weigh") -> Bases:
    """The bases of a random tiny model on `TOKENS`."""
    settings = Covariance.model_validate({"estimator": "naive", "gradients": gradients})
    return bases_of(tiny.model(kind), kind, TOKENS, settings)


def rows_to_learn(count: int, seed: int) -> torch.Tensor:
    """Rows that count up in steps of one to four, with a token in eight replaced by chance: count x length."""
    draw = torch.Generator().manual_seed(seed)
    first, step = (torch.randint(low, high, (count, 1), generator=draw) for low, high in ((0, 400), (1, 5)))
    rows = (first + step * torch.arange(_LENGTH)) % 400
    noise = torch.rand(rows.shape, generator=draw) < 1 / 8
    return torch.where(noise, torch.randint(0, 400, rows.shape, generator=draw), rows)


@cache
def trained_model(kind: str = "llama") -> PreTrainedModel:
    """A tiny model after some steps on such rows: far better than chance, so that its layers are no noise."""
    model = tiny.model(kind).requires_grad_(True)
    optimiser = torch.optim.Adam(model.parameters(), lr=3e-3)
    for step in range(_STEPS):
        ids = rows_to_learn(32, step)
        loss = model(input_ids=ids, labels=ids).loss
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return model.requires_grad_(False)


def trained_copy(kind: str = "llama") -> PreTrainedModel:
    """Another one with the same weights, to be changed."""
    return copy.deepcopy(trained_model(kind))
