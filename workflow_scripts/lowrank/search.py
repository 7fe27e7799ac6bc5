"""Bayesian optimisation of the rank allocation (paper, Section 3.3).

A Gaussian process (GPyTorch: Matern 5/2 with one length scale per variable, learned noise) models the objective
over the kept ratios; BoTorch maximises the logarithm of expected improvement on the budget polytope. Every
evaluation is appended to a CSV; a search that was killed reads it back and goes on, and makes the same choices as
one that was not, since each step seeds its generators anew and sees the same numbers.
"""

from __future__ import annotations

import csv
import logging
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from botorch.acquisition import LogExpectedImprovement
from botorch.exceptions.errors import BotorchError, ModelFittingError
from botorch.exceptions.warnings import BadInitialCandidatesWarning, NumericsWarning
from botorch.fit import fit_gpytorch_mll
from botorch.models import SingleTaskGP
from botorch.models.transforms import Normalize, Standardize
from botorch.optim import optimize_acqf
from gpytorch.kernels import MaternKernel, ScaleKernel
from gpytorch.mlls import ExactMarginalLogLikelihood
from gpytorch.priors import GammaPrior, LogNormalPrior

from lowrank.config.presets import Search
from lowrank.objective import Score
from lowrank.search_space import SearchSpace

log = logging.getLogger(__name__)

RESTARTS, RAW_SAMPLES = 8, 128


@dataclass(frozen=True)
class Trial:
    """One evaluated allocation.

    Attributes:
        origin: `uniform`, `random` or `improvement`.
        x: the kept ratios, d.
        score: what it scored.
        kept: share of the decoder's linear parameters kept after rounding.
    """

    origin: str
    x: np.ndarray
    score: Score
    kept: float


class TrialLog:
    """The CSV of all evaluations, appended to line by line and read back after a kill."""

    def __init__(self, path: Path, names: list[str]) -> None:
        self.path = path
        self.columns = ["trial", "origin", "perplexity", "kl", "objective", "kept", *names]
        self.names = names

    def read(self) -> list[Trial]:
        """All complete lines; a last line that a kill cut short is dropped from the file."""
        if not self.path.is_file():
            return []
        text = self.path.read_text(encoding="utf-8")
        complete = text[: text.rfind("\n") + 1]
        if complete != text:
            self.path.write_text(complete, encoding="utf-8")
        rows = list(csv.DictReader(complete.splitlines()))
        return [
            Trial(
                row["origin"],
                np.array([float(row[name]) for name in self.names]),
                Score(float(row["perplexity"]), float(row["kl"]), float(row["objective"])),
                float(row["kept"]),
            )
            for row in rows
        ]

    def append(self, index: int, trial: Trial) -> None:
        """Add one line; numbers are written so that they read back exactly."""
        new = not self.path.is_file() or not self.path.stat().st_size
        with open(self.path, "a", encoding="utf-8", newline="") as stream:
            writer = csv.writer(stream, lineterminator="\n")
            if new:
                writer.writerow(self.columns)
            score = trial.score
            numbers = [score.perplexity, score.kl, score.objective, trial.kept, *trial.x.tolist()]
            writer.writerow([index, trial.origin, *map(repr, map(float, numbers))])


def search_allocation(
    space: SearchSpace,
    evaluate: Callable[[Mapping[str, int | None]], Score],
    settings: Search,
    seed: int,
    trials_file: Path,
) -> list[Trial]:
    """Run the search to its last evaluation.

    Args:
        space: variables and budget.
        evaluate: scores an allocation; smaller is better.
        settings: number of evaluations and bounds.
        seed: of the initial design and of every step.
        trials_file: read first, appended to after each evaluation.

    Returns:
        All trials in order.
    """
    trial_log = TrialLog(trials_file, space.names)
    trials = trial_log.read()
    if trials:
        log.info("search: %d of %d evaluations were finished before", len(trials), settings.evaluations)
    initial = np.vstack([space.uniform()[None], space.sample(settings.initial - 1, seed)])
    for index in range(len(trials), settings.evaluations):
        started = time.monotonic()
        if index < len(initial):
            origin, x = ("uniform" if index == 0 else "random"), initial[index]
        else:
            origin, x = propose(space, trials, seed * 100_003 + index)
        ranks = space.ranks(x)
        trial = Trial(origin, x, evaluate(ranks), space.budget.kept(ranks))
        trial_log.append(index, trial)
        trials.append(trial)
        best = min(trial.score.objective for trial in trials)
        log.info(
            "search %d/%d (%s): objective %.4f, best %.4f, %.1f s",
            index + 1,
            settings.evaluations,
            origin,
            trial.score.objective,
            best,
            time.monotonic() - started,
        )
    return trials


def best_trial(trials: list[Trial]) -> int:
    """Index of the trial with the smallest objective (the first of equals)."""
    return min(range(len(trials)), key=lambda index: trials[index].score.objective)


def propose(space: SearchSpace, trials: list[Trial], seed: int) -> tuple[str, np.ndarray]:
    """The point of the budget polytope with the largest expected improvement.

    The objective is modelled on a logarithmic scale, since perplexity spans orders of magnitude.

    Returns:
        The point, after the word that the log of trials has for where it comes from: `improvement`, or `random` where
        the model could not be fitted or the acquisition not be optimised.
    """
    torch.manual_seed(seed)
    x = torch.tensor(np.array([trial.x for trial in trials]), dtype=torch.double)
    if x.shape[1] == 1:
        return "improvement", space.uniform()
    y = -torch.tensor([[trial.score.objective] for trial in trials], dtype=torch.double).log()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", (NumericsWarning, BadInitialCandidatesWarning))
        try:
            model = fit_model(x, y, space.bounds())
            candidate, _ = optimize_acqf(
                LogExpectedImprovement(model, best_f=y.max()),
                bounds=space.bounds(),
                q=1,
                num_restarts=RESTARTS,
                raw_samples=RAW_SAMPLES,
                equality_constraints=[space.constraint()],
                options={"seed": seed},
            )
        except (RuntimeError, ValueError, BotorchError, ModelFittingError) as error:
            # A resumed search would fail at the same evaluation again, so it must be able to go on.
            log.warning("search: no model of the objective could be fitted (%s); taking a random allocation", error)
            return "random", space.sample(1, seed)[0]
    point: np.ndarray = np.clip(candidate.squeeze(0).numpy(), space.lower, 1.0)
    return "improvement", point


def fit_model(x: torch.Tensor, y: torch.Tensor, bounds: torch.Tensor) -> SingleTaskGP:
    """Fit the Gaussian process by maximum a posteriori.

    Args:
        x: t x d points.
        y: t x 1 values.
        bounds: 2 x d, to scale the inputs to the unit cube.
    """
    d = x.shape[1]
    kernel = ScaleKernel(
        MaternKernel(nu=2.5, ard_num_dims=d, lengthscale_prior=GammaPrior(3.0, 6.0)),
        outputscale_prior=LogNormalPrior(0.0, 1.0),
    )
    model = SingleTaskGP(
        x, y, covar_module=kernel, input_transform=Normalize(d, bounds=bounds), outcome_transform=Standardize(1)
    )
    fit_gpytorch_mll(ExactMarginalLogLikelihood(model.likelihood, model))
    return model
