"""The objective against full logits in float64: both directions, both reductions, and what it does not compute."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch.nn import functional

from lowrank.config.presets import Search
from lowrank.config.sources import ModelShape
from lowrank.errors import RankwiseError
from lowrank.model.checkpoint import replace_modules
from lowrank.ranks.budget import Budget, Ranks
from lowrank.search import objective
from lowrank.search.allocation import sliced_factors
from lowrank.search.kept_ratios import SearchSpace
from lowrank.search.objective import Objective, Score
from lowrank.search.sliced_model import SlicedModel
from tests import tiny
from tests.unit.search.test_search import tiny_bases

CPU = torch.device("cpu")
WINDOWS = torch.randint(2, 400, (5, 20), generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> tuple[SlicedModel, Ranks, dict[str, torch.Tensor]]:
    """A sliced model, ranks, and n x T tables of nll, KL(compressed || dense) and KL(dense || compressed)."""
    bases = tiny_bases("llama-gqa", tmp_path_factory.mktemp("bases"))
    budget = Budget.of(ModelShape(**tiny.shape("llama-gqa")))
    space = SearchSpace(budget, 25, 2, ("v",), lower=0.1)
    ranks = space.ranks(space.sample(1, 0)[0])
    rebuilt = tiny.model("llama-gqa")
    replace_modules(rebuilt, sliced_factors(bases, rebuilt, budget, ranks))
    log_p, log_q = (
        functional.log_softmax(model(WINDOWS).logits[:, :-1].double(), -1)
        for model in (rebuilt, tiny.model("llama-gqa"))
    )
    exact = {
        "nll": -log_p.gather(-1, WINDOWS[:, 1:, None]).squeeze(-1),
        "reverse": (log_p.exp() * (log_p - log_q)).sum(-1),
        "forward": (log_q.exp() * (log_q - log_p)).sum(-1),
    }
    return SlicedModel(tiny.model("llama-gqa"), budget, bases), ranks, exact


@pytest.mark.parametrize("reduction", ["token", "sequence"])
@pytest.mark.parametrize("direction", ["reverse", "forward"])
def test_each_direction_and_reduction(case: tuple, direction: str, reduction: str) -> None:
    sliced, ranks, exact = case
    search = Search(kl_weight=0.5, kl_direction=direction, kl_reduction=reduction)
    score = Objective.of(sliced, WINDOWS, search, CPU).evaluate(ranks)
    kl = exact[direction].mean() if reduction == "token" else exact[direction].sum(1).mean()
    assert score.perplexity == pytest.approx(math.exp(float(exact["nll"].mean())), rel=1e-4)
    assert score.kl == pytest.approx(float(kl), rel=1e-4)
    assert score.objective == pytest.approx(score.perplexity + 0.5 * float(kl), rel=1e-4)
    assert abs(float(exact["reverse"].mean() / exact["forward"].mean()) - 1) > 0.003, "the directions differ"


def test_a_mean_over_tokens_does_not_depend_on_the_length_of_windows_and_a_sum_does(
    case: tuple, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every position is given the same loss and divergence; only their number differs."""
    sliced, ranks, _ = case
    monkeypatch.setattr(
        objective,
        "token_nll_and_kl",
        lambda hidden, reference, head, targets, direction: (
            torch.full((len(hidden),), 2.0),
            torch.full((len(hidden),), 0.25),
        ),
    )

    def score(length: int, reduction: str) -> objective.Score:
        return Objective(sliced, WINDOWS[:, :length], 4.0, CPU, reduction=reduction).evaluate(ranks)

    assert score(20, "token").objective == score(10, "token").objective == pytest.approx(math.exp(2) + 4 * 0.25)
    assert score(20, "sequence").kl == pytest.approx(19 * 0.25)
    assert score(10, "sequence").kl == pytest.approx(9 * 0.25)


def test_without_a_weight_the_dense_model_never_runs(case: tuple, monkeypatch: pytest.MonkeyPatch) -> None:
    sliced, ranks, exact = case
    runs = []
    run = objective.last_hidden
    monkeypatch.setattr(objective, "last_hidden", lambda model, ids: (runs.append(sliced.layers), run(model, ids))[1])
    judge = Objective.of(sliced, WINDOWS, Search(kl_weight=0), CPU)
    assert not runs
    score = judge.evaluate(ranks)
    assert len(runs) == len(judge.batches)
    assert score.kl is None
    assert score.objective == score.perplexity == pytest.approx(math.exp(float(exact["nll"].mean())), rel=1e-4)


def test_windows_go_through_the_model_in_batches_of_so_many_tokens(
    case: tuple, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The peak depends on the batch, not on the number of windows; hidden states of the dense model wait on the CPU."""
    sliced, ranks, exact = case
    monkeypatch.setattr(objective, "TOKENS_PER_BATCH", 45)
    seen = []
    run = objective.last_hidden
    monkeypatch.setattr(objective, "last_hidden", lambda model, ids: (seen.append(ids.numel()), run(model, ids))[1])
    judge = Objective.of(sliced, WINDOWS, Search(), CPU)
    score = judge.evaluate(ranks)
    assert seen == [40, 40, 20] * 2
    assert [part.device.type for part in judge.reference] == ["cpu"] * 3
    assert score.kl == pytest.approx(float(exact["reverse"].mean()), rel=1e-4)


@pytest.mark.parametrize("broken", [math.nan, math.inf, 1e4])  # of the last the perplexity alone is infinite
@pytest.mark.parametrize("kl_weight", [0.0, 1.0])
def test_ranks_that_break_the_model_are_infinitely_bad_and_logged(
    broken: float, kl_weight: float, case: tuple, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    sliced, ranks, _ = case
    judge = Objective.of(sliced, WINDOWS, Search(kl_weight=kl_weight), CPU)
    working = judge.evaluate(ranks)

    def losses(hidden: torch.Tensor, *_: object, **__: object) -> Any:
        lost = torch.full((len(hidden),), broken)
        return (lost, torch.zeros(len(hidden))) if kl_weight else lost

    with monkeypatch.context() as patch:
        patch.setattr(objective, "token_nll_and_kl" if kl_weight else "token_nll", losses)
        assert judge.evaluate(ranks) == Score(math.inf, math.inf if kl_weight else None, math.inf)
    assert "they count as infinitely bad: {'model.layers.0" in caplog.text
    assert judge.evaluate(ranks) == working


def test_losses_of_windows_that_are_not_finite_are_named() -> None:
    losses = torch.tensor([1.0, 2.0])
    assert objective.finite_losses(losses, "x") is losses
    with pytest.raises(RankwiseError, match="q at 40 % kept: its loss is not finite; set `dtype: float32`"):
        objective.finite_losses(losses / 0, "q at 40 % kept")
