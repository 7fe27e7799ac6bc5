"""The objective against a rebuilt model, and the search: better than where it starts, and the same after a kill."""

import math
from collections.abc import Callable, Mapping
from itertools import count
from pathlib import Path

import numpy as np
import pytest
import torch
from botorch.exceptions.errors import ModelFittingError
from torch.nn import functional

from lowrank.bases.block import bases_of_block
from lowrank.bases.principal import Bases
from lowrank.calibration.statistics import collect_statistics, load_moments
from lowrank.config.presets import Covariance, Search
from lowrank.config.sources import ModelShape
from lowrank.errors import RankwiseError
from lowrank.files import layer_name, save_tensors
from lowrank.model.checkpoint import family_of, replace_modules
from lowrank.ranks.budget import Budget, Ranks
from lowrank.search import search, surrogate
from lowrank.search.allocation import sliced_factors
from lowrank.search.kept_ratios import SearchSpace
from lowrank.search.objective import Objective, Score, window_losses
from lowrank.search.search import Trial, TrialLog, best_trial, objective_of, search_allocation
from lowrank.search.sliced_model import SlicedModel
from tests import tiny

CPU = torch.device("cpu")
SMOLLM = ModelShape(**tiny.SMOLLM)


POOLED = Covariance(estimator="pooled", groups=3)


def tiny_bases(kind: str, folder: Path, covariance: Covariance = POOLED) -> Bases:
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
        stored = bases_of_block(linears, moments, covariance, CPU, "block")
        save_tensors(folder / "bases" / layer_name(layer), stored)
    return Bases(folder / "bases", tiny.LAYERS)


@pytest.mark.parametrize("covariance", [POOLED, Covariance(estimator="uncentred")], ids=["pooled", "uncentred"])
@pytest.mark.parametrize("kind", tiny.FEW)
def test_slices_score_as_a_rebuilt_model_does(kind: str, covariance: Covariance, tmp_path: Path) -> None:
    bases = tiny_bases(kind, tmp_path, covariance)
    budget = Budget.of(ModelShape(**tiny.shape(kind)))
    space = SearchSpace(budget, 25, 2, ("v",), lower=0.1)
    ranks = space.ranks(space.sample(1, 0)[0])
    windows = torch.randint(2, 400, (5, 20), generator=torch.Generator().manual_seed(3))

    dense, rebuilt = tiny.model(kind), tiny.model(kind)
    replace_modules(rebuilt, sliced_factors(bases, rebuilt, budget, ranks))
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


TYPE_WEIGHTS = {"q": 0.2, "k": 0.2, "o": 0.5, "gate": 1.0, "up": 2.0, "down": 6.0}


def landscape(space: SearchSpace) -> Callable[[Mapping[str, int | None]], Score]:
    """A smooth objective in the logarithms of kept ratios, whose optimum is far from the uniform point.

    Types weigh differently, and so do the first and the last groups of layers.
    """
    layers = space.budget.dimensions.layers

    def evaluate(ranks: Mapping[str, int | None]) -> Score:
        loss = 2.0
        for module in space.budget.modules:
            rank = ranks.get(module.name)
            share = 1.0 if rank is None else rank * (module.out_features + module.in_features) / module.parameters
            weight = TYPE_WEIGHTS.get(module.type.name, 0.0) * (1.5 - module.layer / layers)
            loss += 3 * weight * math.log(min(share, 1.0)) ** 2 / layers
        return Score(math.exp(loss), 0.5, math.exp(loss))

    return evaluate


def small_space() -> SearchSpace:
    return SearchSpace(Budget.of(SMOLLM), 20, 1, ("v",), lower=0.2)


def run(trials_file: Path, seed: int = 0, evaluate: object = None, **options: object) -> list[Trial]:
    space = small_space()
    settings = Search(**{"evaluations": 7, "initial": 4, **options})
    return search_allocation(space, evaluate or landscape(space), settings, seed, trials_file)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Trial], Path]:
    """A search from its first evaluation to its last, and its log."""
    path = tmp_path_factory.mktemp("whole") / "trials.csv"
    return run(path), path


def breaking(space: SearchSpace, broken: Callable[[int], bool]) -> Callable[[Mapping[str, int | None]], Score]:
    """The landscape, where some evaluations break the model."""
    score, evaluations = landscape(space), count()
    return lambda ranks: Score(math.inf, math.inf, math.inf) if broken(next(evaluations)) else score(ranks)


def test_a_search_goes_on_after_allocations_that_break_the_model(tmp_path: Path) -> None:
    """And the same way after a kill: its log has them as infinite."""
    path = tmp_path / "trials.csv"
    trials = run(path, evaluate=breaking(small_space(), lambda index: index in (0, 4)))
    assert [math.isinf(trial.score.objective) for trial in trials] == [index in (0, 4) for index in range(7)]
    assert [trial.origin for trial in trials[4:]] == ["improvement"] * 3
    assert best_trial(trials) not in (0, 4)
    assert objective_of(trials, "uniform") is None
    assert objective_of(trials, "lord") == trials[1].score.objective
    whole = path.read_bytes()
    path.write_bytes(b"\n".join(whole.split(b"\n")[:6]) + b"\n")
    run(path)
    assert path.read_bytes() == whole


def test_the_model_of_the_objective_takes_broken_allocations_for_as_bad_as_the_worst(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    given = []
    monkeypatch.setattr(
        search, "candidates", lambda space, x, y, *_: (given.append(y.tolist()), space.sample(1, len(x)))[1]
    )
    trials = run(tmp_path / "trials.csv", evaluate=breaking(small_space(), lambda index: index in (1, 5)))
    scores = [trial.score.objective for trial in trials]
    worst = max(scores[0], *scores[2:4])
    assert given[0] == [scores[0], worst, *scores[2:4]]
    assert max(given[2]) < math.inf


@pytest.mark.parametrize(("evaluations", "initial"), [(7, 4), (4, 4)])
def test_a_search_that_finds_no_finite_loss_ends_with_the_cure(evaluations: int, initial: int, tmp_path: Path) -> None:
    path = tmp_path / "trials.csv"
    for _ in range(2):  # and again, where it would go on
        with pytest.raises(RankwiseError, match=r"none of 4 allocations has a finite loss.* set `dtype: float32`"):
            run(path, evaluate=breaking(small_space(), lambda _: True), evaluations=evaluations, initial=initial)
    assert len(path.read_text().splitlines()) == 1 + 4


def test_a_search_starts_where_it_is_told_and_then_improves(whole: tuple[list[Trial], Path]) -> None:
    trials, _ = whole
    assert [trial.origin for trial in trials] == ["uniform", "lord", "spread", "spread"] + ["improvement"] * 3
    best = trials[best_trial(trials)]
    assert best.origin == "improvement"
    assert best.score.objective < 0.9 * trials[0].score.objective
    assert all(trial.kept <= 0.8 for trial in trials)
    assert objective_of(trials, "lord") == trials[1].score.objective
    assert objective_of(trials, "transfer") is None


@pytest.mark.parametrize("seed", [0, 1])
def test_twenty_variables_beat_uniform_lord_and_random_search(seed: int, tmp_path: Path) -> None:
    space = SearchSpace(Budget.of(SMOLLM), 20, 4, ("v",), lower=0.2)
    evaluate = landscape(space)
    settings = Search(evaluations=12, initial=3)
    trials = search_allocation(space, evaluate, settings, seed, tmp_path / "trials.csv")
    scores = [trial.score.objective for trial in trials]
    random = [evaluate(space.ranks(x)).objective for x in space.sample(50, seed)]
    assert min(scores) < 0.9 * scores[0], "uniform"
    assert min(scores) < 0.95 * scores[1], "LoRD"
    assert min(scores) < 0.7 * min(random), "four times as many random allocations"


def test_a_killed_search_makes_the_same_choices_as_one_that_was_not(
    whole: tuple[list[Trial], Path], tmp_path: Path
) -> None:
    evaluate, calls = landscape(small_space()), []

    class Killed(Exception):
        pass

    def dies_at_the_sixth(ranks: Mapping[str, int | None]) -> Score:
        calls.append(ranks)
        if len(calls) == 6:
            raise Killed
        return evaluate(ranks)

    part = tmp_path / "part.csv"
    with pytest.raises(Killed):
        run(part, evaluate=dies_at_the_sixth)
    part.write_text(part.read_text() + "5,improvement,1.23")  # a line that the kill cut short
    resumed = run(part)
    assert part.read_bytes() == whole[1].read_bytes()
    assert np.array_equal([trial.x for trial in resumed], [trial.x for trial in whole[0]])


def test_seeds_decide(whole: tuple[list[Trial], Path], tmp_path: Path) -> None:
    other = run(tmp_path / "other.csv", seed=1, evaluations=5)
    for index in (2, 3, 4):  # the given points are the same, the spread ones and the steps are not
        assert not np.array_equal(other[index].x, whole[0][index].x)


def test_numbers_of_the_log_read_back_exactly(whole: tuple[list[Trial], Path]) -> None:
    trials, path = whole
    assert path.read_text().split("\n")[0] == "trial,origin,perplexity,kl,objective,kept,qk/0,o/0,gate/0,up/0,down/0"
    again = TrialLog(path, small_space().names).read()
    assert [trial.score for trial in again] == [trial.score for trial in trials]
    assert all(np.array_equal(a.x, b.x) for a, b in zip(again, trials, strict=True))


def test_a_divergence_that_was_not_computed_stays_empty_in_the_log(tmp_path: Path) -> None:
    log = TrialLog(tmp_path / "trials.csv", ["qk/0"])
    log.append(0, Trial("uniform", np.array([0.8]), Score(3.0, None, 3.0), 0.79))
    assert log.path.read_text().split("\n")[1] == "0,uniform,3.0,,3.0,0.79,0.8"
    assert log.read()[0].score == Score(3.0, None, 3.0)


def test_a_share_of_the_steps_is_random_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    always = run(tmp_path / "a.csv", random_share=0.999)
    assert [trial.origin for trial in always[4:]] == ["random"] * 3
    assert len({tuple(trial.x) for trial in always[4:]}) == 3
    some = Search(random_share=0.3)
    monkeypatch.setattr(search, "candidates", lambda *_: [always[0].x])
    space = Unbounded()
    found = [search.propose(space, always, some, step, space.ranks) for step in range(300)]
    points = np.array([x for origin, x in found if origin == "random"])
    assert 0.2 < len(points) / len(found) < 0.4
    assert points.mean(axis=0) == pytest.approx(0.5, abs=0.1)  # that they are drawn decides nothing of where


class Unbounded(SearchSpace):
    """A space that draws its points as those without a budget do."""

    def __init__(self) -> None:
        space = small_space()
        super().__init__(space.budget, 20, 1, ("v",), lower=0.2)

    def sample(self, count: int, seed: int) -> np.ndarray:
        return np.random.default_rng(seed).random((count, len(self.names)))


def test_a_transferred_allocation_comes_first_and_may_be_all(tmp_path: Path) -> None:
    space = small_space()
    ratios = np.array([0.4, 0.5, 0.6, 0.7, 0.9])
    settings = Search(evaluations=1, initial=1, start=[])
    trials = search_allocation(space, landscape(space), settings, 0, tmp_path / "a.csv", ratios)
    assert [trial.origin for trial in trials] == ["transfer"]
    assert np.array_equal(trials[0].x, space.onto_budget(ratios))


def test_ranks_that_were_evaluated_are_not_evaluated_again(monkeypatch: pytest.MonkeyPatch) -> None:
    space = small_space()
    known, new = space.uniform(), space.sample(1, 0)[0]
    trials = [Trial("uniform", known, Score(3.0, 0.0, 3.0), 0.8)]
    monkeypatch.setattr(search, "candidates", lambda *_: np.array([known, known - 1e-9, new]))
    assert np.array_equal(search.propose(space, trials, Search(), 0, space.ranks)[1], new)
    monkeypatch.setattr(search, "candidates", lambda *_: np.array([known, known - 1e-9]))
    assert np.array_equal(search.propose(space, trials, Search(), 0, space.ranks)[1], known)


def test_a_point_is_allocated_once_by_a_resumed_search_too(whole: tuple[list[Trial], Path], tmp_path: Path) -> None:
    """An allocation of a large model takes most of a second, and each step looks at the ranks of all trials."""
    asked: list[bytes] = []

    class Counted(SearchSpace):
        def ranks(self, x: np.ndarray) -> Ranks:
            asked.append(x.tobytes())
            return super().ranks(x)

    trials, path = whole
    space = Counted(Budget.of(SMOLLM), 20, 1, ("v",), lower=0.2)
    part = tmp_path / "part.csv"
    part.write_text("".join(path.read_text().splitlines(keepends=True)[:5]))  # of the trials, the first four
    search_allocation(space, landscape(space), Search(evaluations=7, initial=4), 0, part)
    assert part.read_bytes() == path.read_bytes()
    assert len(asked) == len(set(asked))
    assert {trial.x.tobytes() for trial in trials} <= set(asked)


def test_a_search_of_one_variable_ends(tmp_path: Path) -> None:
    space = SearchSpace(Budget.of(SMOLLM), 5, 1, ("q", "k", "v", "o", "gate", "up"), lower=0.2)
    settings = Search(evaluations=4, initial=2)
    trials = search_allocation(space, landscape(space), settings, 0, tmp_path / "a.csv")
    assert [trial.origin for trial in trials] == ["uniform", "spread", "improvement", "improvement"]
    wide = SearchSpace(Budget.of(SMOLLM), 5, 1, ("q", "k", "v", "o", "gate", "up"), lower=0.2, band=0.1)
    trials = search_allocation(wide, landscape(wide), settings, 0, tmp_path / "b.csv")
    assert len({trial.x[0] for trial in trials}) == 4


def test_a_band_lets_a_search_keep_less_than_the_budget(tmp_path: Path) -> None:
    """The objective here has its optimum below the budget, where only a search with a band can go."""
    space = SearchSpace(Budget.of(SMOLLM), 20, 1, ("v",), lower=0.2, band=0.1)

    def best_at_75_percent(ranks: Mapping[str, int | None]) -> Score:
        value = math.exp(100 * (space.budget.kept(ranks) - 0.75) ** 2)
        return Score(value, 0.0, value)

    settings = Search(evaluations=9, initial=4, band=0.1)
    trials = search_allocation(space, best_at_75_percent, settings, 0, tmp_path / "a.csv")
    assert trials[best_trial(trials)].kept == pytest.approx(0.75, abs=0.01)
    assert all(0.68 < trial.kept <= 0.8 for trial in trials)


def test_a_model_that_cannot_be_fitted_does_not_stop_the_search(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fails(*args: object) -> None:
        raise ModelFittingError("all attempts to fit the model have failed")

    monkeypatch.setattr(surrogate, "fit_model", fails)
    trials = run(tmp_path / "trials.csv")
    assert [trial.origin for trial in trials[4:]] == ["random"] * 3
    assert "no model of the objective could be fitted" in caplog.text
