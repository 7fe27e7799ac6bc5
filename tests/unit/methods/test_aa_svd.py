"""AA-SVD: reduced-rank regression by numpy on models rebuilt layer by layer, the training of blocks, and going on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from transformers import PreTrainedModel

from lowrank.compression.compress import compress_model
from lowrank.jobs.state import Parts
from lowrank.methods.aa_svd import Settings
from lowrank.model.checkpoint import replace_modules
from lowrank.model.factors import LowRankFactors
from lowrank.model.partial_forward import block_input, output_of
from lowrank.ranks.budget import Budget, Ranks
from tests import tiny
from tests.unit.model import factor_samples as samples
from tests.unit.model.factor_samples import TOKENS

PRESET = {"kind": "aa-svd", "calibration": "c"}
REFINED = {"refine": 3, "learning_rate": 3e-3, "batch_size": 4}


def compressed(kind: str, ratio: int, **settings: Any) -> tuple[PreTrainedModel, Ranks]:
    return samples.compressed("aa-svd", kind, ratio, model=tiny.model(kind).double(), **settings)


def regression(y: np.ndarray, x: np.ndarray, rank: int) -> np.ndarray:
    """The matrix of a rank with the least error of y (tokens x m) from x (tokens x n): least squares, then the best
    subspace of its fitted values."""
    whole = np.linalg.lstsq(x, y, rcond=None)[0].T
    directions = np.linalg.svd(x @ whole.T, full_matrices=False)[2][:rank]
    return np.asarray(directions.T @ directions @ whole)


@pytest.mark.parametrize("target", ["dense", "inputs"])
@pytest.mark.parametrize("kind", tiny.FEW)
def test_every_layer_is_a_regression_on_the_inputs_of_the_compressed_model(kind: str, target: str) -> None:
    """Plain passes through a model that is rebuilt one site at a time, in the order of the forward pass."""
    dense = tiny.model(kind).double()
    model, ranks = compressed(kind, 30, target=target)
    right, rebuilt = samples.inputs_of_layers(dense), tiny.model(kind).double()
    budget, checked = Budget.of(samples.shape_of(kind)), 0
    for layer, site in dict.fromkeys((module.layer, module.type.site) for module in budget.modules):
        read = samples.inputs_of_layers(rebuilt)
        done = {}
        for module in budget.modules:
            if (module.layer, module.type.site) != (layer, site) or (rank := ranks[module.name]) is None:
                continue
            weight, found = dense.get_submodule(module.name).weight, samples.product(model, module.name)
            x = read[module.name].numpy()
            y = (right[module.name] if target == "dense" else read[module.name]).numpy() @ weight.numpy().T
            best = regression(y, x, rank)
            least, reached = (float(np.linalg.norm(y - x @ each.T)) for each in (best, found.numpy()))
            assert reached <= least * (1 + 1e-4), (
                module.name
            )  # nothing of this rank is better; dead neurons add a ridge
            assert np.linalg.matrix_rank(found.numpy(), tol=1e-9) == rank
            pair = model.get_submodule(module.name)
            done[module.name] = LowRankFactors(pair.down.weight, pair.up.weight, pair.up.bias)
            checked += 1
        replace_modules(rebuilt, done)
    assert checked > 2 * tiny.LAYERS


def test_dense_targets_bring_the_model_nearer_to_the_dense_one_than_whitening_alone() -> None:
    dense = tiny.model("llama-gqa").double()(TOKENS).logits
    errors = [
        float((samples.compressed(method, "llama-gqa", 30, model=tiny.model("llama-gqa").double(), **more)[0](
            TOKENS
        ).logits - dense).norm())
        for method, more in (("svd-llm", {}), ("aa-svd", {}), ("aa-svd", REFINED | {"refine": 10}))
    ]  # fmt: skip
    assert errors[0] > 1.2 * errors[1] > 1.2 * errors[2]


def test_only_the_pairs_of_a_block_are_trained_towards_its_dense_outputs() -> None:
    dense = tiny.model("qwen2").double()
    plain, ranks = compressed("qwen2", 30)
    refined, same = compressed("qwen2", 30, **REFINED | {"refine": 20})
    assert ranks == same
    pairs = [name for name, rank in ranks.items() if rank is not None]
    before, after = dict(plain.named_parameters()), dict(refined.named_parameters())
    for name, parameter in after.items():
        trained = any(name in (f"{pair}.down.weight", f"{pair}.up.weight") for pair in pairs)
        assert torch.equal(parameter, before[name]) != trained, name
        assert not parameter.requires_grad
    entering = block_input(dense, TOKENS)
    right = output_of(dense, TOKENS, 0, entering)
    errors = [float((output_of(model, TOKENS, 0, entering) - right).norm()) for model in (plain, refined)]
    assert errors[1] < 0.99 * errors[0]


def test_training_that_helps_nothing_is_left_out() -> None:
    """A step far too long; the pairs are those from before."""
    plain, _ = compressed("llama", 30)
    refined, _ = compressed("llama", 30, refine=1, learning_rate=3.0, batch_size=12)
    assert torch.equal(plain(TOKENS).logits, refined(TOKENS).logits)


def test_seeds_order_the_windows_and_nothing_else() -> None:
    one, same, other = (compressed("llama", 30, seed=seed, **REFINED)[0](TOKENS).logits for seed in (1, 1, 2))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    assert not Settings.model_validate(PRESET).is_random
    assert Settings.model_validate(PRESET | REFINED).is_random


def test_no_block_draws_as_one_of_another_seed_does(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: dict[int, set[int]] = {0: set(), 1: set()}
    permuted = torch.randperm
    for seed, seeds in drawn.items():

        def randperm(count: int, generator: torch.Generator, seeds: set[int] = seeds) -> torch.Tensor:
            seeds.add(generator.initial_seed())
            return permuted(count, generator=generator)

        monkeypatch.setattr(torch, "randperm", randperm)
        compressed("llama", 30, seed=seed, **REFINED)
    assert len(drawn[0]) == len(drawn[1]) == tiny.LAYERS
    assert not drawn[0] & drawn[1]


@pytest.mark.parametrize("more", [{}, REFINED], ids=str)
def test_a_stopped_compression_goes_on_after_the_last_block(
    more: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected, ranks = compressed("opt", 30, **more)
    budget, parts = Budget.of(samples.shape_of("opt")), Parts(tmp_path)

    def run(tokens: torch.Tensor = TOKENS) -> PreTrainedModel:
        model = tiny.model("opt").double()
        task = {"model": model, "budget": budget, "ratio": 30, "seed": 0, "tokens": tokens, "parts": parts}
        assert compress_model("aa-svd", PRESET | more, task) == ranks
        return model

    save, saved = parts.save, []

    def stop(name: str, tensors: dict[str, torch.Tensor]) -> None:
        save(name, tensors)
        saved.append(name)
        raise KeyboardInterrupt

    monkeypatch.setattr(parts, "save", stop)
    with pytest.raises(KeyboardInterrupt):
        run()
    monkeypatch.setattr(parts, "save", save)
    again = run()
    assert saved == ["block_0"]
    assert torch.equal(again(TOKENS).logits, expected(TOKENS).logits)
    kept = parts.load("block_0")
    assert kept
    name = next(key for key in kept if key.endswith(":up"))
    parts.save("block_0", kept | {name: torch.zeros_like(kept[name])})
    assert not torch.allclose(run()(TOKENS).logits, expected(TOKENS).logits)  # it is read, not made again


def test_a_ratio_of_zero_changes_nothing() -> None:
    samples.check_unchanged_at_ratio_zero("aa-svd", "opt", **REFINED)


@pytest.mark.parametrize(("kind", "ratio"), [("llama", 10), ("qwen3", 30), ("opt", 60)])
def test_the_budget_holds(kind: str, ratio: int) -> None:
    samples.check_budget("aa-svd", kind, ratio)


@pytest.mark.parametrize("kind", ["mistral", "opt"])
def test_a_checkpoint_is_the_model(kind: str, tmp_path: Path) -> None:
    model, _ = samples.compressed("aa-svd", kind, 25, **REFINED)
    samples.check_round_trip(model, tmp_path)


def test_what_it_reads_and_refuses() -> None:
    few, _ = compressed("llama", 30, windows=5)
    same, _ = compressed("llama", 30, tokens=TOKENS[:5])
    assert torch.equal(few(TOKENS).logits, same(TOKENS).logits)
    for key in ("learning_rate", "batch_size"):
        with pytest.raises(ValidationError, match="is for `refine` only"):
            Settings.model_validate(PRESET | {key: 2})
