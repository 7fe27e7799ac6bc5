"""ASVD: the scaled decomposition against numpy, the search against rebuilt models and an exhaustive cut."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from lowrank.bases import weighted_svd
from lowrank.bases.weighted_svd import weigh_columns, weigh_columns_randomised
from lowrank.compression import sensitivity_search
from lowrank.compression.sensitivity_search import Trial, cut_trials, measure_layers, spend_rest
from lowrank.errors import RankwiseError
from lowrank.jobs.state import Parts
from lowrank.methods import asvd
from lowrank.model.checkpoint import replace_modules
from lowrank.model.factors import LowRankFactors
from lowrank.model.families import LinearModule
from lowrank.model.modeling_rankwise import LowRankLinear
from lowrank.ranks.budget import ALIGNMENT, Budget
from lowrank.ranks.by_type import uniform_ranks
from lowrank.ranks.reach import candidate_ranks, largest_rank_worth_it
from tests import tiny
from tests.unit.model import factor_samples as samples
from tests.unit.model.factor_samples import CPU, TOKENS

SMOLLM = Budget.of(samples.ModelShape(**tiny.SMOLLM))
KEPT = asvd.Settings(kind="asvd", calibration="c").kept


def budget_of(kind: str) -> Budget:
    return replace(Budget.of(samples.shape_of(kind)), adds_bias=False)


def scaled_matrix(m: int, n: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    scale = 10 ** (3 * torch.rand(n, generator=g, dtype=torch.double) - 2)
    return torch.randn(m, n, generator=g, dtype=torch.double), scale


@settings(max_examples=40, deadline=None)
@given(m=st.integers(2, 24), n=st.integers(2, 24), seed=st.integers(0, 999))
def test_scaled_columns_give_the_best_scaled_approximation(m: int, n: int, seed: int) -> None:
    w, s = scaled_matrix(m, n, seed)
    ordered = weigh_columns(w, s, "layer")
    for rank in range(1, min(m, n) + 1):
        pair = ordered.factors(rank, None)
        expected = samples.truncation(w * s, rank) / s
        assert torch.allclose(pair.up @ pair.down, expected, atol=1e-8 * float(w.abs().max()))
        assert torch.allclose(pair.up.norm(dim=0), pair.down.norm(dim=1)), "the factors share the singular values"


@settings(max_examples=40, deadline=None)
@given(m=st.integers(4, 24), n=st.integers(4, 24), rank=st.integers(1, 4), seed=st.integers(0, 999))
def test_the_randomised_decomposition_is_seeded_and_not_much_worse(m: int, n: int, rank: int, seed: int) -> None:
    w, s = scaled_matrix(m, n, seed)
    state = torch.get_rng_state()
    pair = weigh_columns_randomised(w, s, rank, seed, "layer").factors(rank, None)
    assert torch.equal(torch.get_rng_state(), state), "the random state of others is used up"
    torch.manual_seed(seed + 1)
    again = weigh_columns_randomised(w, s, rank, seed, "layer").factors(rank, None)
    assert torch.equal(pair.up, again.up), "the random directions depend on more than the seed"
    torch.set_rng_state(state)
    best = float((w * s - samples.truncation(w * s, rank)).norm())
    error = float(((w - pair.up @ pair.down) * s).norm())
    assert best - 1e-9 <= error <= 3 * best + 1e-9
    low = samples.truncation(w, rank)
    exact = weigh_columns_randomised(low, s, rank, seed, "layer").factors(rank, None)
    assert torch.allclose(exact.up @ exact.down, low, atol=1e-7 * float(w.abs().max()))


@pytest.mark.parametrize("kind", tiny.FEW)
def test_every_layer_is_the_decomposition_scaled_by_its_inputs(kind: str) -> None:
    dense = tiny.model(kind)
    inputs = samples.inputs_of_layers(dense)
    model, ranks = samples.compressed("asvd", kind, 30, allocation="uniform")
    assert ranks == uniform_ranks(budget_of(kind), 30, ())
    for name, rank in ranks.items():
        if rank is None:
            continue
        layer = dense.get_submodule(name)
        s = inputs[name].abs().mean(0).sqrt() + 1e-6
        expected = samples.truncation(layer.weight.double() * s, rank) / s
        assert torch.allclose(samples.product(model, name), expected, atol=1e-4 * float(layer.weight.abs().max()))
        assert (model.get_submodule(name).up.bias is None) == (layer.bias is None)


@pytest.mark.parametrize("more", [{"allocation": "uniform"}, {"windows": 2, "kept": [0.5, 0.75], "rounding": "down"}])
def test_a_layer_is_made_when_those_before_it_are_in_their_places(
    more: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Factors of a whole model in float32 are twice as large as it is in 16 bits."""
    model, seen, make = tiny.model("llama").half(), [], weighted_svd.OrderedFactors.factors

    def watched(self: weighted_svd.OrderedFactors, *arguments: Any) -> LowRankFactors:
        seen.append(sum(isinstance(module, LowRankLinear) for module in model.modules()))
        return make(self, *arguments)

    monkeypatch.setattr(weighted_svd.OrderedFactors, "factors", watched)
    _, ranks = samples.compressed("asvd", "llama", 30, model=model, **more)
    count = sum(rank is not None for rank in ranks.values())
    assert count > 3
    assert seen[-count:] == list(range(count))


def test_the_exponent_decides_the_scale() -> None:
    plain, _ = samples.compressed("svd", "llama", 30)
    names = [name for name, module in plain.named_modules() if isinstance(module, LowRankLinear)]
    none, _ = samples.compressed("asvd", "llama", 30, allocation="uniform", alpha=0)
    full, _ = samples.compressed("asvd", "llama", 30, allocation="uniform", alpha=1)
    for name in names:
        assert torch.allclose(samples.product(none, name), samples.product(plain, name), atol=1e-5)
        assert not torch.allclose(samples.product(full, name), samples.product(plain, name), atol=1e-3)


@pytest.mark.parametrize("kind", tiny.FEW)
def test_trials_have_the_losses_of_rebuilt_models(kind: str) -> None:
    model, budget = tiny.model(kind), budget_of(kind)
    candidates = candidate_ranks(budget, [0.4, 0.8], ())

    def factorise(module: LinearModule) -> asvd.Callable[[int], LowRankFactors]:
        layer = model.get_submodule(module.name)
        ordered = weigh_columns(layer.weight, torch.ones(module.in_features), module.name)
        return lambda rank: ordered.factors(rank, layer.bias)

    windows = TOKENS[:5, :20]
    trials = measure_layers(model, windows, budget, candidates, factorise, CPU)
    assert {(trial.layer, trial.rank) for trial in trials} == {(n, r) for n, ranks in candidates.items() for r in ranks}
    for trial in trials:
        module = next(module for module in budget.modules if module.name == trial.layer)
        rebuilt = copy.deepcopy(model)
        replace_modules(rebuilt, {trial.layer: factorise(module)(trial.rank)})
        logits = rebuilt(windows).logits[:, :-1].double()
        loss = functional.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())
        assert trial.loss == pytest.approx(float(loss), abs=1e-5)
    assert len({trial.loss for trial in trials}) == len(trials), "the trials do not differ"
    assert torch.equal(model(TOKENS).logits, tiny.model(kind)(TOKENS).logits), "the model was changed"


def test_batches_do_not_change_the_losses(monkeypatch: pytest.MonkeyPatch) -> None:
    model, budget = tiny.model("qwen2"), budget_of("qwen2")
    candidates = {budget.modules[3].name: [8]}
    pair = LowRankFactors(torch.randn(8, 64), torch.randn(64, 8))
    whole = measure_layers(model, TOKENS, budget, candidates, lambda module: lambda rank: pair, CPU)
    monkeypatch.setattr(sensitivity_search, "TOKENS_PER_BATCH", 2 * TOKENS.shape[1])
    parts = measure_layers(model, TOKENS, budget, candidates, lambda module: lambda rank: pair, CPU)
    assert parts[0].loss == pytest.approx(whole[0].loss, rel=1e-6)


def test_a_rank_that_breaks_the_model_counts_as_the_worst() -> None:
    model, budget = tiny.model("llama"), budget_of("llama")
    broken = LowRankFactors(torch.full((8, 64), 1e30), torch.full((64, 8), 1e30))
    trials = measure_layers(
        model, TOKENS, budget, {budget.modules[0].name: [8]}, lambda module: lambda rank: broken, CPU
    )
    assert [trial.loss for trial in trials] == [math.inf]
    model.model.layers[1].mlp.up_proj.weight.data.fill_(float("nan"))
    with pytest.raises(RankwiseError, match=r"^model\.layers\.1\.mlp\.up_proj: .* the dense model's loss"):
        measure_layers(model, TOKENS, budget, {}, lambda module: lambda rank: broken, CPU)


def test_a_stopped_search_goes_on_after_the_last_layer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = {"kept": [0.4, 0.8], "windows": 4, "length": 16, "decomposition": "randomised"}
    expected, ranks = samples.compressed("asvd", "llama-gqa", 25, **options)
    parts, measured = Parts(tmp_path), []
    save, trials_of = parts.save, sensitivity_search._trials

    def run() -> dict[str, torch.Tensor]:
        model, same = samples.compressed("asvd", "llama-gqa", 25, finished_parts=parts, **options)
        assert same == ranks
        return model.state_dict()

    def counted(*arguments: Any) -> list[Trial]:
        measured.append(arguments[1].name)
        return trials_of(*arguments)

    def stop(name: str, tensors: dict[str, torch.Tensor]) -> None:
        save(name, tensors)
        if len(measured) == 9:  # within the second block
            raise KeyboardInterrupt

    monkeypatch.setattr(sensitivity_search, "_trials", counted)
    monkeypatch.setattr(parts, "save", stop)
    with pytest.raises(KeyboardInterrupt):
        run()
    monkeypatch.setattr(parts, "save", save)
    again = run()
    assert measured == [module.name for module in budget_of("llama-gqa").modules], "none is measured twice"
    for name, tensor in expected.state_dict().items():
        assert torch.equal(again[name], tensor), name
    kept = tmp_path / f"{measured[0]}.safetensors"
    kept.write_bytes(kept.read_bytes()[:-1])
    with pytest.raises(RankwiseError, match=f"damaged.* Delete {tmp_path} and run the workflow again"):
        run()


def test_trials_that_were_kept_have_the_losses_that_were_measured(tmp_path: Path) -> None:
    """To the last bit, and of a rank that breaks the model too."""
    model, budget, parts = tiny.model("qwen2"), budget_of("qwen2"), Parts(tmp_path)
    pairs = {rank: LowRankFactors(torch.randn(rank, 64), torch.randn(64, rank)) for rank in (8, 16)}
    pairs[24] = LowRankFactors(torch.full((24, 64), 1e30), torch.full((64, 24), 1e30))
    candidates = {budget.modules[0].name: [8, 24, 16], budget.modules[3].name: [24]}

    def measure() -> list[Trial]:
        return measure_layers(model, TOKENS, budget, candidates, lambda module: pairs.__getitem__, CPU, parts)

    first = measure()
    assert [trial.loss == math.inf for trial in first] == [False, True, False, True]
    pairs.clear()
    assert measure() == first


def test_candidates_are_worth_it_and_in_steps_of_eight() -> None:
    candidates = candidate_ranks(SMOLLM, KEPT, ("v",))
    gate, key = "model.layers.0.mlp.gate_proj", "model.layers.0.self_attn.k_proj"
    assert candidates[gate] == [160, 208, 248, 288, 328, 376]  # break-even at 576 x 1536 / 2112 = 418.9
    assert candidates[key] == [56, 72, 80, 96, 112, 128]  # break-even at 576 x 192 / 768 = 144
    assert not any("v_proj" in name for name in candidates)
    tiny_ones = candidate_ranks(budget_of("llama-gqa"), KEPT, ())
    assert tiny_ones["model.layers.0.self_attn.k_proj"] == [8, 16]  # break-even at 64 x 32 / 96 = 21.3
    narrow = tiny.SMOLLM | {"hidden": 32, "intermediate": 64, "heads": 4, "kv_heads": 1, "head_dim": 8}
    budget = replace(Budget.of(samples.ModelShape(**narrow)), adds_bias=False)
    assert candidate_ranks(budget, KEPT, ())[key] == [6]  # break-even at 8 x 32 / 40 = 6.4
    with pytest.raises(RankwiseError, match="no linear layers of type w"):
        candidate_ranks(SMOLLM, KEPT, ("w",))


def random_trials(budget: Budget, kept: list[float], seed: int, ties: bool) -> list[Trial]:
    """Losses that mostly grow as the rank shrinks, or that take a few values only."""
    g = torch.Generator().manual_seed(seed)
    trials = []
    for layer, ranks in candidate_ranks(budget, kept, ()).items():
        weight = float(torch.rand(1, generator=g))
        for rank in ranks:
            loss = weight / rank + 0.02 * float(torch.rand(1, generator=g))
            trials.append(Trial(layer, rank, round(loss, 2) if ties else loss))
    return trials


@settings(max_examples=60, deadline=None)
@given(
    kind=st.sampled_from(["llama", "qwen2", "opt"]),
    ratio=st.integers(3, 55),
    seed=st.integers(0, 99),
    ties=st.booleans(),
)
def test_the_cut_is_the_last_that_fits(kind: str, ratio: int, seed: int, ties: bool) -> None:
    budget = budget_of(kind)
    trials = random_trials(budget, KEPT, seed, ties)
    ordered = sorted(trials, key=lambda trial: (-trial.loss, trial.rank, trial.layer))
    best = None
    for cut in range(len(ordered) + 1):  # every position, one by one
        permitted = {
            module.name: [t.rank for t in ordered[cut:] if t.layer == module.name] for module in budget.modules
        }
        ranks = {name: min(found, default=None) for name, found in permitted.items()}
        if budget.parameters(ranks) <= budget.allowed(ratio):
            best = ranks
    assert best is not None
    got = cut_trials(trials[::-1], budget, ratio)
    assert got == best
    raised = spend_rest(got, trials, budget, ratio)
    left = budget.allowed(ratio) - budget.parameters(raised)
    assert left >= 0
    for module in budget.modules:
        before, after = got[module.name], raised[module.name]
        assert (before is None) == (after is None)
        if before is None or after is None:
            continue
        assert after >= before
        assert (after - before) % ALIGNMENT == 0
        if after + ALIGNMENT <= largest_rank_worth_it(budget, module):
            assert left < ALIGNMENT * (module.in_features + module.out_features), "one more step would fit"


@pytest.mark.parametrize("ratio", [20, 30])
@pytest.mark.parametrize("seed", range(3))
def test_a_real_model_meets_its_budget_within_a_tenth_of_a_point(ratio: int, seed: int) -> None:
    budget = replace(SMOLLM, adds_bias=False)
    trials = random_trials(budget, KEPT, seed, ties=False)
    cut = cut_trials(trials, budget, ratio)
    assert 1 - ratio / 100 - 0.01 < budget.kept(cut) <= 1 - ratio / 100
    assert 1 - ratio / 100 - 0.001 < budget.kept(spend_rest(cut, trials, budget, ratio)) <= 1 - ratio / 100


def test_a_ratio_beyond_the_smallest_ranks_is_refused() -> None:
    budget = replace(SMOLLM, adds_bias=False)
    trials = random_trials(budget, [0.8, 0.9], 0, ties=False)
    with pytest.raises(RankwiseError, match=r"removing 40 % is out of reach: .* 78\.\d %\. Add smaller"):
        cut_trials(trials, budget, 40)


@pytest.mark.parametrize("kind", tiny.FEW)
@pytest.mark.parametrize("decomposition", ["exact", "randomised"])
def test_the_search_of_every_family_stays_within_its_budget(kind: str, decomposition: str) -> None:
    for ratio in (20, 30):
        model, ranks = samples.compressed("asvd", kind, ratio, decomposition=decomposition, windows=4, length=16)
        budget = budget_of(kind)
        counts = samples.count_parameters(model, samples.shape_of(kind))
        assert counts["decoder_linears"] == budget.parameters(ranks) <= budget.allowed(ratio)
        raisable = [
            ALIGNMENT * (module.in_features + module.out_features)
            for module in budget.modules
            if (rank := ranks[module.name]) is not None and rank + ALIGNMENT <= largest_rank_worth_it(budget, module)
        ]
        missing = budget.allowed(ratio) - counts["decoder_linears"]
        assert not raisable or missing < min(raisable)


def test_windows_and_length_limit_what_the_search_reads() -> None:
    options = {"rounding": "down", "kept": [0.5, 0.8]}
    few, _ = samples.compressed("asvd", "llama", 20, windows=2, length=10, **options)
    same, _ = samples.compressed("asvd", "llama", 20, tokens=TOKENS[:2, :10], **options)
    assert torch.equal(few(TOKENS).logits, same(TOKENS).logits)


def test_a_search_leaves_types_dense() -> None:
    samples.check_left_dense("asvd", "llama", 20, windows=2, length=10, kept=[0.5, 0.8])


def test_a_failed_decomposition_names_the_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        raise torch.linalg.LinAlgError("did not converge")

    monkeypatch.setattr(weighted_svd, "left_singular_vectors", fail)
    with pytest.raises(RankwiseError, match=r"model\.layers\.0\.self_attn\.q_proj: .* did not converge"):
        samples.compressed("asvd", "llama", 20)
    monkeypatch.undo()
    monkeypatch.setattr(torch, "svd_lowrank", lambda *args, **options: fail(args[0]))
    with pytest.raises(RankwiseError, match=r"model\.layers\.0\.self_attn\.q_proj: .* did not converge"):
        samples.compressed("asvd", "llama", 20, decomposition="randomised")
    with pytest.raises(RankwiseError, match=r"layer: .* not finite"):
        weigh_columns(torch.full((4, 4), float("nan")), torch.ones(4), "layer")


@pytest.mark.parametrize("allocation", ["strs", "uniform"])
@pytest.mark.parametrize("kind", tiny.FEW)
def test_a_ratio_of_zero_changes_nothing(kind: str, allocation: str) -> None:
    samples.check_unchanged_at_ratio_zero("asvd", kind, allocation=allocation)


@settings(max_examples=25, deadline=None)
@given(kind=st.sampled_from(list(tiny.FEW)), ratio=st.integers(5, 70))
def test_the_budget_of_the_uniform_allocation_holds(kind: str, ratio: int) -> None:
    samples.check_budget("asvd", kind, ratio, allocation="uniform")


@pytest.mark.parametrize("kind", tiny.FEW)
def test_a_checkpoint_is_the_model(kind: str, tmp_path: Path) -> None:
    model, _ = samples.compressed("asvd", kind, 25, windows=2, kept=[0.5, 0.75])
    samples.check_round_trip(model, tmp_path)
