"""The model of the objective that guides the search, and the choice of the next point by it.

A Gaussian process (GPyTorch) with a Matern 5/2 kernel of one length scale per variable and learned noise, on the
logarithm of the objective or on the objective itself; BoTorch maximises an acquisition function on the budget.
"""

from __future__ import annotations

import math
import warnings

import numpy as np
import torch
from botorch.acquisition import AcquisitionFunction, ExpectedImprovement, LogExpectedImprovement
from botorch.acquisition.logei import qLogNoisyExpectedImprovement
from botorch.exceptions.warnings import BadInitialCandidatesWarning, NumericsWarning, OptimizationWarning
from botorch.fit import fit_gpytorch_mll
from botorch.models import SingleTaskGP
from botorch.models.transforms import Normalize, Standardize
from botorch.optim import optimize_acqf
from botorch.sampling import SobolQMCNormalSampler
from gpytorch.constraints import GreaterThan
from gpytorch.kernels import MaternKernel, ScaleKernel
from gpytorch.mlls import ExactMarginalLogLikelihood
from gpytorch.priors import LogNormalPrior

from lowrank.config.presets import LengthScales, Search
from lowrank.search.space import Space

SCATTERED, AROUND = 1024, 256
"""Candidates that the acquisition is evaluated at: all over the space, and around each of the best points."""

BEST_POINTS = 4
CLIMBS = 2
"""Gradient ascents from the best of either kind of candidates."""

_ATTENTION_SITES = ("attention", "attention_output")
_SMALLEST_LENGTH_SCALE = 2.5e-2
_POSTERIOR_SAMPLES = 128
_FIT = {"ftol": 1e-6, "maxcor": 30}  # the same optimum as by default, in a fifth of the steps


def candidates(space: Space, points: np.ndarray, objectives: np.ndarray, settings: Search, seed: int) -> np.ndarray:
    """Points that may be tried next, n x d, from the largest acquisition downwards.

    Args:
        space: variables and budget.
        points: t x d, evaluated so far.
        objectives: t values, positive; smaller is better.
        settings: kind of model and of acquisition.
        seed: of all that is random here.

    Raises:
        RuntimeError, ValueError, BotorchError: the model cannot be fitted or the acquisition not be optimised.
    """
    torch.manual_seed(seed)
    x = torch.tensor(points, dtype=torch.double)
    y = -torch.tensor(objectives, dtype=torch.double)[:, None]
    if settings.response == "log":
        y = -(-y).log()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", (NumericsWarning, BadInitialCandidatesWarning, OptimizationWarning))
        model = fit_model(x, y, space, settings.length_scales)
        acquisition = acquisition_of(model, x, y, settings, seed)
        best = points[np.argsort(objectives, kind="stable")[:BEST_POINTS]]
        return maximise(acquisition, space, best, seed)


def fit_model(x: torch.Tensor, y: torch.Tensor, space: Space, scales: LengthScales | None) -> SingleTaskGP:
    """Fit the Gaussian process by maximum a posteriori.

    The prior of a length scale grows with the square root of the number of variables, as distances do; without that,
    a few dozen points in 20 dimensions look unrelated to each other.

    Args:
        x: t x d points, which the model scales to the unit cube.
        y: t x 1 values, larger is better; the model standardises them.
        space: whose bounds scale the points, and whose types the length scales go by.
        scales: those of attention and MLP, fixed or to begin with; None starts from the prior's mode.
    """
    d = x.shape[1]
    prior = LogNormalPrior(math.sqrt(2) + math.log(d) / 2, math.sqrt(3))
    matern = MaternKernel(
        nu=2.5,
        ard_num_dims=d,
        lengthscale_prior=prior if scales is None or scales.learned else None,
        lengthscale_constraint=GreaterThan(_SMALLEST_LENGTH_SCALE, transform=None, initial_value=prior.mode),
    )
    if scales is not None:
        matern.lengthscale = torch.tensor([length_scale_of(name, space, scales) for name in space.names])
        matern.raw_lengthscale.requires_grad_(scales.learned)
    model = SingleTaskGP(
        x,
        y,
        covar_module=ScaleKernel(matern, outputscale_prior=LogNormalPrior(0.0, 1.0)),
        input_transform=Normalize(d, bounds=space.bounds()),
        outcome_transform=Standardize(1),
    )
    fit_gpytorch_mll(ExactMarginalLogLikelihood(model.likelihood, model), optimizer_kwargs={"options": _FIT})
    return model


def length_scale_of(name: str, space: Space, scales: LengthScales) -> float:
    """The preset's length scale of a variable: that of attention if its matrices read or end attention."""
    sites = {module.type.site for module in space.matrices[name]}
    return scales.attention if sites <= set(_ATTENTION_SITES) else scales.mlp


def acquisition_of(
    model: SingleTaskGP, x: torch.Tensor, y: torch.Tensor, settings: Search, seed: int
) -> AcquisitionFunction:
    """The acquisition function that the preset names; larger is better.

    Args:
        model: fitted to x and y.
        x: t x d points.
        y: t x 1 values; `ei` and `log-ei` compare with the largest, `noisy-log-ei` with what the model makes of all.
        settings: the preset.
        seed: of the posterior samples of `noisy-log-ei`.
    """
    if settings.acquisition == "noisy-log-ei":
        sampler = SobolQMCNormalSampler(torch.Size([_POSTERIOR_SAMPLES]), seed=seed)
        return qLogNoisyExpectedImprovement(model, x, sampler=sampler, prune_baseline=True)
    kind = ExpectedImprovement if settings.acquisition == "ei" else LogExpectedImprovement
    return kind(model, best_f=y.max())


def maximise(acquisition: AcquisitionFunction, space: Space, best: np.ndarray, seed: int) -> np.ndarray:
    """Candidates from the largest acquisition downwards.

    The acquisition is flat over most of a space of many variables, so ascents start where it is largest among many
    cheap candidates: points all over the space, and points around the best ones found so far.

    Args:
        acquisition: to be maximised.
        space: its bounds and budget.
        best: points whose surroundings are searched as well.
        seed: of the candidates.

    Returns:
        n x d, the ends of the ascents and all points that were tried without, sorted.
    """
    generator = np.random.default_rng(seed)
    near = np.concatenate([space.around(x, AROUND, generator) for x in best])
    tried, starts = [], []
    for points in (space.scatter(SCATTERED, generator), near):
        values = _values(acquisition, points)
        tried.append(points)
        starts.append(points[np.argsort(-values, kind="stable")[:CLIMBS]])
    begin = torch.tensor(np.concatenate(starts), dtype=torch.double)[:, None]
    ends, _ = optimize_acqf(
        acquisition,
        bounds=space.bounds(),
        q=1,
        num_restarts=len(begin),
        batch_initial_conditions=begin,
        return_best_only=False,
        options={"batch_limit": 1, "maxiter": 100},
        **space.constraints(),
    )
    found = np.concatenate([space.onto_budget(ends.squeeze(1).numpy()), *tried])
    order = np.argsort(-_values(acquisition, found), kind="stable")
    sorted_points: np.ndarray = found[order]
    return sorted_points


def _values(acquisition: AcquisitionFunction, points: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        values: np.ndarray = acquisition(torch.tensor(points, dtype=torch.double)[:, None]).numpy()
    return values
