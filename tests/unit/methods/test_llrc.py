"""LLRC: which directions it leaves by numpy, that only masks are trained, and the budget it stops at."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from lowrank.calibration.statistics import Statistics, collect_statistics
from lowrank.compression import masks
from lowrank.compression.compress import compress_model
from lowrank.errors import RankwiseError
from lowrank.jobs.state import Parts
from lowrank.methods.llrc import Settings
from lowrank.model.parameters import count_parameters
from lowrank.ranks.budget import Budget, Ranks
from tests import tiny
from tests.unit.model import factor_samples as samples
from tests.unit.model.factor_samples import CPU, TOKENS

FAST = {"steps": 150, "learning_rate": 0.3, "growth": 0.3, "settle": 30, "batch_size": 2}
SLOWER = FAST | {"steps": 300, "learning_rate": 0.2, "growth": 0.2, "settle": 100}


def compressed(kind: str, ratio: int, **settings: Any) -> tuple[PreTrainedModel, Ranks]:
    moments = samples.statistics(kind, double=True)
    model = tiny.model(kind).double()
    return samples.compressed("llrc", kind, ratio, model=model, moments=moments, **FAST | settings)


@pytest.mark.parametrize(("kind", "alpha"), [*((kind, 0.5) for kind in tiny.FEW), ("opt", 0.9)])
def test_what_is_left_are_directions_of_the_scaled_matrix_unchanged(kind: str, alpha: float) -> None:
    """In the singular directions of W diag(s) a pair is diagonal, each entry the singular value or zero."""
    dense = tiny.model(kind).double()
    inputs = samples.inputs_of_layers(dense)
    model, ranks = compressed(kind, 30, alpha=alpha)
    assert any(ranks.values())
    for name, rank in ranks.items():
        if rank is None:
            continue
        scale = inputs[name].abs().mean(0).numpy() ** alpha + 1e-6
        u, e, vh = np.linalg.svd(dense.get_submodule(name).weight.numpy() * scale, full_matrices=False)
        core = u.T @ (samples.product(model, name).numpy() * scale) @ vh.T
        kept = core.diagonal() / e
        assert np.allclose(core, np.diag(core.diagonal()), atol=1e-5 * e[0])
        assert np.allclose(np.sort(kept), np.repeat([0, 1], [len(e) - rank, rank]), atol=1e-4)
        bias = dense.get_submodule(name).bias
        assert bias is None or torch.equal(model.get_submodule(name).up.bias, bias)


def test_directions_that_carry_nothing_leave_first(tmp_path: Path) -> None:
    """In a model whose matrices have rank 20 that is all that 40 % need, and the model is the dense one as before."""

    def of_low_rank() -> PreTrainedModel:
        model = tiny.model("llama").double()
        for module in Budget.of(samples.shape_of("llama")).modules:
            weight = model.get_submodule(module.name).weight
            weight.data = samples.truncation(weight, 20)
        return model

    model, shape = of_low_rank(), samples.shape_of("llama")
    collect_statistics(model, TOKENS, 2, tmp_path, CPU)
    statistics = Statistics(tmp_path, shape)
    for seed in (0, 1):
        model = of_low_rank()
        samples.compressed("llrc", "llama", 30, model=model, moments=statistics, seed=seed, **SLOWER)
        found, expected = model(TOKENS).logits, of_low_rank()(TOKENS).logits
        assert float((found - expected).norm()) < 0.2 * float(expected.norm())
    whitened = of_low_rank()
    samples.compressed("asvd", "llama", 30, model=whitened, moments=statistics, allocation="uniform")
    assert float((whitened(TOKENS).logits - expected).norm()) > float((found - expected).norm())


def test_masks_are_chosen_better_than_one_ratio_for_all() -> None:
    dense = tiny.model("opt").double()(TOKENS).logits
    learnt, _ = compressed("opt", 30)
    uniform, _ = samples.compressed("asvd", "opt", 30, model=tiny.model("opt").double(), allocation="uniform")
    errors = [float((model(TOKENS).logits - dense).norm()) for model in (learnt, uniform)]
    assert errors[0] < 0.95 * errors[1]


@pytest.mark.parametrize(("kind", "ratio"), [("llama-gqa", 15), ("qwen3", 30), ("opt", 50)])
def test_the_budget_is_met_to_a_step(kind: str, ratio: int) -> None:
    shape = samples.shape_of(kind)
    model, ranks = compressed(kind, ratio)
    counts = count_parameters(model, shape)
    by_hand = 0
    for module in Budget.of(shape).modules:
        m, n, rank = module.out_features, module.in_features, ranks[module.name]
        by_hand += m * n if rank is None else rank * (m + n)
        assert rank is None or (rank % 8 == 0 and rank * (m + n) < m * n)
    allowed = (1 - ratio / 100) * counts["decoder_linears_dense"]
    assert allowed - 8 * (tiny.HIDDEN + tiny.INTERMEDIATE) < by_hand == counts["decoder_linears"] <= allowed


def test_nothing_but_masks_is_trained_and_the_seed_draws_them() -> None:
    model, ranks = compressed("qwen2", 25)
    dense = dict(tiny.model("qwen2").double().named_parameters())
    for name, parameter in model.named_parameters():
        assert not parameter.requires_grad
        if name in dense and ranks.get(name.rpartition(".")[0]) is None:
            assert torch.equal(parameter, dense[name]), name
    same, _ = compressed("qwen2", 25)
    assert torch.equal(same(TOKENS).logits, model(TOKENS).logits)
    others = [compressed("qwen2", 25, seed=seed)[0](TOKENS).logits for seed in (1, 2)]
    assert not all(torch.equal(other, model(TOKENS).logits) for other in others)
    assert Settings.model_validate({"kind": "llrc", "calibration": "c"}).is_random


@pytest.mark.parametrize("stopped", [14, 42], ids=["before the budget is met", "while masks settle"])
def test_a_stopped_training_goes_on(stopped: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected, ranks = compressed("llama-gqa", 30)
    monkeypatch.setattr(masks, "STEPS_KEPT", 7)
    parts, steps = Parts(tmp_path), []
    save, draw = parts.save, masks._draw_masks

    def run() -> PreTrainedModel:
        model = tiny.model("llama-gqa").double()
        task = {"model": model, "budget": Budget.of(samples.shape_of("llama-gqa")), "ratio": 30, "seed": 0}
        task |= {"tokens": TOKENS, "parts": parts, "statistics": samples.statistics("llama-gqa", double=True)}
        assert compress_model("llrc", {"kind": "llrc", "calibration": "c", **FAST}, task) == ranks
        return model

    def stop(name: str, tensors: dict[str, torch.Tensor]) -> None:
        save(name, tensors)
        if int(tensors["step"]) == stopped:
            assert ("met" in tensors) == (stopped == 42)
            raise KeyboardInterrupt

    def counted(*arguments: Any) -> None:
        steps.append(1)
        draw(*arguments)

    monkeypatch.setattr(masks, "_draw_masks", counted)
    monkeypatch.setattr(parts, "save", stop)
    with pytest.raises(KeyboardInterrupt):
        run()
    assert len(steps) == stopped
    monkeypatch.setattr(parts, "save", save)
    again = run()
    whole, steps[:] = len(steps), []
    fresh, _ = compressed("llama-gqa", 30)
    assert len(steps) == whole > 20  # no step was made twice
    assert torch.equal(again(TOKENS).logits, fresh(TOKENS).logits)
    assert torch.equal(again(TOKENS).logits, expected(TOKENS).logits)


def test_types_are_left_dense() -> None:
    samples.check_left_dense("llrc", "llama", 30, **FAST | {"growth": 1.0, "settle": 0})


def test_a_ratio_of_zero_changes_nothing() -> None:
    samples.check_unchanged_at_ratio_zero("llrc", "mistral")


def test_a_checkpoint_is_the_model(tmp_path: Path) -> None:
    model, _ = samples.compressed("llrc", "llama-gqa", 25, **FAST)
    samples.check_round_trip(model, tmp_path)


def test_the_budget_may_be_met_by_the_very_last_step(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        compressed("llama", 30, **FAST)
    (needed,) = map(int, re.findall(r"the budget is met after (\d+) steps", caplog.text))
    assert compressed("llama", 30, **FAST | {"steps": needed})
    assert compressed("llama", 30, **FAST | {"steps": needed + 1, "settle": 100})  # no time to settle
    with pytest.raises(RankwiseError, match=f"after {needed - 1} steps they do not meet the budget yet"):
        compressed("llama", 30, **FAST | {"steps": needed - 1})


def test_a_budget_that_is_not_met_says_what_to_raise() -> None:
    with pytest.raises(RankwiseError, match="after 3 steps they do not meet the budget yet; raise `steps`"):
        compressed("llama", 30, steps=3)
    with pytest.raises(RankwiseError, match="no allocation fits the budget"):
        compressed("llama", 99)


def test_the_scale_of_the_loss_is_kept_with_the_rest(tmp_path: Path) -> None:
    logits = torch.zeros(3, requires_grad=True)
    optimiser = torch.optim.Adam([logits])
    logits.grad = torch.ones(3)
    optimiser.step()
    parts = Parts(tmp_path)
    parts.save("masks", masks._state(optimiser, logits, masks._Course(step=4, scale=2.0**9)))
    assert masks._restored(parts, optimiser, logits) == masks._Course(step=4, scale=2.0**9)
