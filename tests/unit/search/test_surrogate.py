"""The model of the objective and the choice of the next point: each option changes what it is said to change."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from botorch.acquisition import ExpectedImprovement, LogExpectedImprovement
from botorch.acquisition.logei import qLogNoisyExpectedImprovement

from lowrank.config.presets import LengthScales, Search
from lowrank.config.sources import ModelShape
from lowrank.ranks.budget import Budget
from lowrank.search import surrogate
from lowrank.search.kept_ratios import SearchSpace
from tests import tiny

SMOLLM = ModelShape(**tiny.SMOLLM)
PAPER = LengthScales(attention=1.0, mlp=0.8)


def smollm(**options: object) -> SearchSpace:
    return SearchSpace(Budget.of(SMOLLM), 20, 1, ("v",), **{"lower": 0.2, **options})


def trials(space: SearchSpace, count: int = 12) -> tuple[np.ndarray, np.ndarray]:
    """Points with objectives of a smooth function that spans orders of magnitude."""
    points = space.sample(count, 5)
    wants = np.linspace(0.5, 2.5, len(space.names))
    return points, np.exp(2 + 3 * (wants * np.log(points) ** 2).sum(1))


def tensors(space: SearchSpace) -> tuple[torch.Tensor, torch.Tensor]:
    points, objectives = trials(space)
    return torch.tensor(points), -torch.tensor(objectives)[:, None].log()


def scales_of(model: surrogate.SingleTaskGP) -> list[float]:
    found: list[float] = model.covar_module.base_kernel.lengthscale.detach().squeeze().tolist()
    return found


def test_given_length_scales_stay_fixed_by_type() -> None:
    space = smollm()
    model = surrogate.fit_model(*tensors(space), space, PAPER)
    expected = {"qk/0": 1.0, "o/0": 1.0, "gate/0": 0.8, "up/0": 0.8, "down/0": 0.8}
    assert dict(zip(space.names, scales_of(model), strict=True)) == pytest.approx(expected)
    opt = SearchSpace(Budget.of(ModelShape(**tiny.shape("opt"))), 20, 2, (), 0.1)
    sides = {name: surrogate.length_scale_of(name, opt, PAPER) for name in opt.names}
    assert {name.split("/")[0]: scale for name, scale in sides.items()} == {
        "qk": 1.0, "v": 1.0, "o": 1.0, "fc1": 0.8, "fc2": 0.8
    }  # fmt: skip


def test_learned_length_scales_begin_at_the_given_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    space, begun = smollm(), []
    fit = surrogate.fit_gpytorch_mll
    monkeypatch.setattr(
        surrogate, "fit_gpytorch_mll", lambda mll, **options: (begun.append(scales_of(mll.model)), fit(mll, **options))
    )
    learned = surrogate.fit_model(*tensors(space), space, PAPER.model_copy(update={"learned": True}))
    free = surrogate.fit_model(*tensors(space), space, None)
    assert begun[0] == pytest.approx([1.0, 1.0, 0.8, 0.8, 0.8])
    mode = math.exp(math.sqrt(2) + math.log(5) / 2 - 3)  # of the log-normal prior
    assert begun[1] == pytest.approx([mode] * 5)
    assert scales_of(learned) != pytest.approx(begun[0], rel=0.05)
    assert max(scales_of(free)) > 1.2 * min(scales_of(free)), "one length scale a variable"


def test_the_model_predicts_what_it_has_not_seen() -> None:
    space = smollm()
    points, objectives = trials(space, 40)
    x, y = torch.tensor(points), -torch.tensor(objectives)[:, None].log()
    model = surrogate.fit_model(x[:30], y[:30], space, None)
    with torch.no_grad():
        error = (model.posterior(x[30:]).mean - y[30:]).pow(2).mean()
    assert error < 0.2 * y[30:].var()


@pytest.mark.filterwarnings("ignore:ExpectedImprovement has known numerical issues")
@pytest.mark.parametrize(
    ("word", "kind"),
    [
        ("log-ei", LogExpectedImprovement),
        ("ei", ExpectedImprovement),
        ("noisy-log-ei", qLogNoisyExpectedImprovement),
    ],
)
def test_the_acquisition_is_the_one_that_is_named(word: str, kind: type) -> None:
    space = smollm()
    x, y = tensors(space)
    model = surrogate.fit_model(x, y, space, PAPER)
    acquisition = surrogate.acquisition_of(model, x, y, Search(acquisition=word), seed=0)
    assert type(acquisition) is kind
    values = surrogate._values(acquisition, space.sample(20, 1))
    ei = surrogate._values(ExpectedImprovement(model, best_f=y.max()), space.sample(20, 1))
    log_ei = np.log(ei) if word != "ei" else ei
    assert np.corrcoef(values, log_ei)[0, 1] > 0.85


def test_log_and_raw_responses_are_modelled_on_their_scales(monkeypatch: pytest.MonkeyPatch) -> None:
    space, seen = smollm(), []
    points, objectives = trials(space)
    fit = surrogate.fit_model
    monkeypatch.setattr(surrogate, "fit_model", lambda x, y, *rest: (seen.append(y), fit(x, y, *rest))[1])
    chosen = [
        surrogate.candidates(space, points, objectives, Search(response=response), 0)[0] for response in ("log", "raw")
    ]
    assert np.allclose(seen[0].squeeze().numpy(), -np.log(objectives))
    assert np.allclose(seen[1].squeeze().numpy(), -objectives)
    assert not np.allclose(*chosen)


@pytest.mark.parametrize("band", [None, 0.1])
def test_candidates_meet_the_budget_or_its_band_and_the_best_comes_first(band: float | None) -> None:
    space = smollm(band=band)
    points, objectives = trials(space)
    x, y = torch.tensor(points), -torch.tensor(objectives)[:, None].log()
    model = surrogate.fit_model(x, y, space, None)
    acquisition = LogExpectedImprovement(model, best_f=y.max())
    found = surrogate.maximise(acquisition, space, points[:2], seed=0)
    assert np.all((found >= space.lower) & (found <= space.upper))
    kept = found @ space.weights
    if band is None:
        assert np.allclose(kept, space.total, atol=1e-9)
    else:
        assert np.all((kept > space.total - band - 1e-9) & (kept < space.total + 1e-9))
    values = surrogate._values(acquisition, found)
    assert np.all(np.diff(values) <= 1e-9)
    random = surrogate._values(acquisition, space.sample(500, 9))
    assert values[0] > random.max(), "the ascents end above what random points reach"
    assert np.array_equal(found, surrogate.maximise(acquisition, space, points[:2], seed=0))


def test_a_step_depends_on_its_seed_alone() -> None:
    space = smollm()
    points, objectives = trials(space)
    found = []
    for seed in (3, 3, 4):
        torch.rand(7)  # whatever happened before
        found.append(surrogate.candidates(space, points, objectives, Search(acquisition="noisy-log-ei"), seed))
    assert np.array_equal(found[0], found[1])
    assert not np.array_equal(found[0][:5], found[2][:5])


def test_the_surroundings_of_the_best_points_are_searched() -> None:
    """Where improvement is confined to a corner, only candidates near it find it in many dimensions."""
    space = SearchSpace(Budget.of(SMOLLM), 20, 4, ("v",), 0.2)
    best = space.sample(1, 0)[0]

    class Spike(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.exp(-2000 * (x.squeeze(1) - torch.tensor(best)).pow(2).sum(-1))

    found = surrogate.maximise(Spike(), space, best[None], seed=0)
    assert np.abs(found[0] - best).max() < 0.01
    elsewhere = surrogate.maximise(Spike(), space, space.uniform()[None], seed=0)
    assert np.abs(elsewhere[0] - best).max() > 0.05


def test_one_point_is_enough_for_a_model() -> None:
    space = smollm()
    points, objectives = trials(space)
    assert surrogate.candidates(space, points[:1], objectives[:1], Search(), 0)[0].shape == (5,)
