"""The objective against a rebuilt model, and the search: better than where it starts, and the same after a kill."""

import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from botorch.exceptions.errors import ModelFittingError
from torch.nn import functional

from lowrank import search
from lowrank.allocation import sliced_factors
from lowrank.bases import Bases, bases_of_block
from lowrank.budget import Budget
from lowrank.checkpoint import family_of, replace_linears
from lowrank.config.presets import Covariance, Search
from lowrank.config.sources import ModelShape
from lowrank.files import layer_name, save_tensors
from lowrank.objective import Objective, Score, window_losses
from lowrank.search import TrialLog, best_trial, search_allocation
from lowrank.search_space import SearchSpace
from lowrank.sliced import SlicedModel
from lowrank.statistics import collect_statistics, load_moments

CPU = torch.device("cpu")
SMOLLM = ModelShape(**tiny.SMOLLM)


def tiny_bases(kind: str, folder: Path) -> Bases:
    model = tiny.model(kind)
    family = family_of(model)
    tokens = torch.randint(2, 400, (6, 32), generator=torch.Generator().manual_seed(0))
    (folder / "bases").mkdir()
    for layer, file in enumerate(collect_statistics(model, tokens, 2, folder, CPU)):
        block = model.get_submodule(f"{family.blocks}.{layer}")
        linears = {
            t.name: (t.site, block.get_submodule(t.path).weight, block.get_submodule(t.path).bias) for t in family.types
        }
        moments = load_moments(file, family.sites)
        stored = bases_of_block(linears, moments, Covariance(estimator="pooled", groups=3), CPU, "block")
        save_tensors(folder / "bases" / layer_name(layer), stored)
    return Bases(folder / "bases", tiny.LAYERS)


@pytest.mark.parametrize("kind", tiny.SHAPES)
def test_slices_score_as_a_rebuilt_model_does(kind: str, tmp_path: Path) -> None:
    bases = tiny_bases(kind, tmp_path)
    budget = Budget.of(ModelShape(**tiny.shape(kind)))
    space = SearchSpace(budget, 25, 2, ("v",), lower=0.1)
    ranks = space.ranks(space.sample(1, 0)[0])
    windows = torch.randint(2, 400, (5, 20), generator=torch.Generator().manual_seed(3))

    dense, rebuilt = tiny.model(kind), tiny.model(kind)
    replace_linears(rebuilt, sliced_factors(bases, budget, ranks))
    log_p = functional.log_softmax(rebuilt(windows).logits[:, :-1].double(), -1)
    log_q = functional.log_softmax(dense(windows).logits[:, :-1].double(), -1)
    nll = -log_p.gather(-1, windows[:, 1:, None]).squeeze(-1)
    kl = (log_p.exp() * (log_p - log_q)).sum(-1)

    sliced = SlicedModel(tiny.model(kind), budget, bases)
    score = Objective(sliced, windows, kl_weight=4.0, device=CPU).evaluate(ranks)
    assert score.perplexity == pytest.approx(math.exp(float(nll.mean())), rel=1e-4)
    assert score.kl == pytest.approx(float(kl.mean()), rel=1e-3, abs=1e-6)
    assert score.objective == pytest.approx(score.perplexity + 4.0 * score.kl)
    assert torch.allclose(window_losses(sliced, windows, CPU), nll.mean(1), atol=1e-4)
    dense_score = Objective(sliced, windows, kl_weight=4.0, device=CPU).evaluate({})
    assert dense_score.kl == pytest.approx(0, abs=1e-6)


def landscape(space: SearchSpace) -> "type":
    """A smooth objective whose optimum is far from the uniform point."""
    weights = {"q": 0.2, "k": 0.2, "o": 0.5, "gate": 1.0, "up": 2.0, "down": 6.0}

    def evaluate(ranks: Mapping[str, int | None]) -> Score:
        loss = 2.0
        for module in space.budget.modules:
            rank = ranks.get(module.name)
            share = 1.0 if rank is None else rank * (module.out_features + module.in_features) / module.parameters
            loss += weights.get(module.type.name, 0.0) * (1 - min(share, 1.0)) ** 2 / 30
        return Score(math.exp(loss), 0.0, math.exp(loss))

    return evaluate


def run(trials_file: Path, seed: int = 0, evaluate: object = None) -> list:
    space = SearchSpace(Budget.of(SMOLLM), 20, 1, ("v",), lower=0.2)
    settings = Search(evaluations=10, initial=4)
    return search_allocation(space, evaluate or landscape(space), settings, seed, trials_file)


def test_the_search_beats_the_uniform_allocation_and_random_ones(tmp_path: Path) -> None:
    trials = run(tmp_path / "trials.csv")
    best = trials[best_trial(trials)]
    assert best.origin == "improvement"
    assert best.score.objective < 0.9 * trials[0].score.objective
    assert all(trial.kept <= 0.8 for trial in trials)
    assert [trial.origin for trial in trials] == ["uniform"] + ["random"] * 3 + ["improvement"] * 6


def test_a_killed_search_makes_the_same_choices_as_one_that_was_not(tmp_path: Path) -> None:
    whole = run(tmp_path / "whole.csv")
    space = SearchSpace(Budget.of(SMOLLM), 20, 1, ("v",), lower=0.2)
    evaluate, calls = landscape(space), []

    class Killed(Exception):
        pass

    def dies_after_six(ranks: Mapping[str, int | None]) -> Score:
        calls.append(ranks)
        if len(calls) == 7:
            raise Killed
        return evaluate(ranks)

    part = tmp_path / "part.csv"
    with pytest.raises(Killed):
        run(part, evaluate=dies_after_six)
    part.write_text(part.read_text() + "6,improvement,1.23")  # a line that the kill cut short
    resumed = run(part)
    assert part.read_bytes() == (tmp_path / "whole.csv").read_bytes()
    assert np.array_equal([trial.x for trial in resumed], [trial.x for trial in whole])


def test_seeds_decide(tmp_path: Path) -> None:
    one, _, other = (run(tmp_path / f"{name}.csv", seed) for name, seed in (("a", 1), ("b", 1), ("c", 2)))
    assert (tmp_path / "a.csv").read_bytes() == (tmp_path / "b.csv").read_bytes()
    assert not np.array_equal([trial.x for trial in one], [trial.x for trial in other])


def test_numbers_of_the_log_read_back_exactly(tmp_path: Path) -> None:
    trials = run(tmp_path / "trials.csv")
    space = SearchSpace(Budget.of(SMOLLM), 20, 1, ("v",), lower=0.2)
    again = TrialLog(tmp_path / "trials.csv", space.names).read()
    assert [trial.score for trial in again] == [trial.score for trial in trials]
    assert all(np.array_equal(a.x, b.x) for a, b in zip(again, trials, strict=True))


def test_a_model_that_cannot_be_fitted_does_not_stop_the_search(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fails(*args: object) -> None:
        raise ModelFittingError("all attempts to fit the model have failed")

    monkeypatch.setattr(search, "fit_model", fails)
    trials = run(tmp_path / "trials.csv")
    assert [trial.origin for trial in trials] == ["uniform"] + ["random"] * 9
    assert "no model of the objective could be fitted" in caplog.text
