"""Fisher bases and predicted losses: optimal in the metric of the gradients, and right about what they leave out."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from lowrank.bases.block import bases_of_block
from lowrank.bases.fisher import fisher_basis, with_predicted_losses
from lowrank.bases.principal import PrincipalBasis, principal_basis
from lowrank.calibration.moments import MomentAccumulator
from lowrank.calibration.output_gradients import collect_output_gradients, load_output_gradients
from lowrank.config.presets import Covariance
from lowrank.errors import RankwiseError
from tests import tiny
from tests.unit.bases.test_principal import affine_rivals, random_layer

CPU = torch.device("cpu")
SIZES = {"m": st.integers(4, 20), "n": st.integers(4, 20), "seed": st.integers(0, 999)}


def gradient_moment(m: int, seed: int, gradients: int | None = None) -> torch.Tensor:
    """G of gradients that differ much in size between directions; singular, if they are fewer than directions."""
    draw = torch.Generator().manual_seed(seed + 1)
    sizes = torch.logspace(-2, 0, m, dtype=torch.float64)[torch.randperm(m, generator=draw)]
    g = sizes[:, None] * torch.randn(m, gradients or 4 * m, generator=draw, dtype=torch.float64)
    return 1e-4 * g @ g.T


def damped(g: torch.Tensor, damping: float) -> torch.Tensor:
    return g + damping * torch.diag(g.diagonal())


def fisher(
    w: torch.Tensor, b: torch.Tensor | None, x: torch.Tensor, g: torch.Tensor, damping: float = 0.01
) -> PrincipalBasis:
    return fisher_basis(w, b, torch.cov(x, correction=0), x.mean(1), g, damping, "layer")


def residual(
    basis: PrincipalBasis, rank: int, w: torch.Tensor, b: torch.Tensor | None, x: torch.Tensor
) -> torch.Tensor:
    """The error of the pair of a rank on every input: m x tokens."""
    pair = basis.factors(rank)
    assert pair.bias is not None
    return w @ x + (0 if b is None else b[:, None]) - (pair.up @ (pair.down @ x) + pair.bias[:, None])


def cost(e: torch.Tensor, g: torch.Tensor) -> float:
    """1/2 E[e' G e]."""
    return float((e * (g @ e)).sum()) / (2 * e.shape[1])


@settings(max_examples=30, deadline=None)
@given(**SIZES, bias=st.booleans(), damping=st.sampled_from([1e-6, 1e-2, 0.5]), few=st.booleans())
def test_the_predicted_loss_is_that_of_the_residual_at_every_rank(
    m: int, n: int, seed: int, bias: bool, damping: float, few: bool
) -> None:
    """Also where G is singular; the mean of the residual is zero, so its second moment is its covariance."""
    w, b, x = random_layer(m, n, 60, seed)
    g = gradient_moment(m, seed, 2 if few else None)
    basis = fisher(w, b if bias else None, x, g, damping)
    assert basis.losses is not None
    assert basis.directions.shape == (m, min(m, n))
    total = cost(w @ x - (w @ x).mean(1, keepdim=True), damped(g, damping))
    for rank in range(1, min(m, n) + 1):
        e = residual(basis, rank, w, b if bias else None, x)
        assert torch.allclose(e.mean(1), torch.zeros(m, dtype=torch.double), atol=1e-7 * float(x.abs().max()))
        assert cost(e, damped(g, damping)) == pytest.approx(
            float(basis.losses[rank:].sum()), rel=1e-6, abs=1e-9 * total
        )


@settings(max_examples=15, deadline=None)
@given(**SIZES)
def test_no_other_affine_map_of_the_rank_costs_less(m: int, n: int, seed: int) -> None:
    w, b, x = random_layer(m, n, 60, seed)
    g = gradient_moment(m, seed)
    metric = damped(g, 0.01)
    basis = fisher(w, b, x, g)
    y = w @ x + b[:, None]
    centred = y - y.mean(1, keepdim=True)  # every rival gets the offset that is best for it
    root = np.linalg.cholesky(metric.numpy()).T
    for rank in {1, max(1, min(m, n) // 2)}:
        best = cost(residual(basis, rank, w, b, x), metric)
        kept = np.linalg.qr(root @ basis.directions[:, :rank].numpy())[0]
        for rival in affine_rivals(root @ centred.numpy(), kept, np.random.default_rng(seed)):
            linear = torch.from_numpy(np.linalg.solve(root, rival @ root))
            assert cost(centred - linear @ centred, metric) > best * (1 - 1e-9)
        principal = principal_basis(w, b, torch.cov(x, correction=0), x.mean(1), "layer", all_directions=True)
        assert cost(residual(principal, rank, w, b, x), metric) >= best * (1 - 1e-9)


@settings(max_examples=15, deadline=None)
@given(**SIZES, scale=st.floats(1e-8, 1e4))
def test_equal_gradients_in_all_directions_give_the_principal_basis(m: int, n: int, seed: int, scale: float) -> None:
    w, b, x = random_layer(m, n, 60, seed)
    equal = fisher(w, b, x, scale * torch.eye(m, dtype=torch.double))
    principal = principal_basis(w, b, torch.cov(x, correction=0), x.mean(1), "layer", all_directions=True)
    for rank in range(1, min(m, n) + 1):
        one, other = equal.factors(rank), principal.factors(rank)
        assert torch.allclose(one.up @ one.down, other.up @ other.down, atol=1e-6 * float(w.abs().max()))
        assert torch.allclose(one.bias, other.bias, atol=1e-5 * float(principal.mean.abs().max()))
    least = 1e-12 * float(equal.losses.max())
    assert torch.allclose(equal.losses, principal.eigenvalues * scale * 1.01 / 2, rtol=1e-6, atol=least)


@settings(max_examples=20, deadline=None)
@given(**SIZES, bias=st.booleans())
def test_principal_bases_predict_what_their_residual_costs(m: int, n: int, seed: int, bias: bool) -> None:
    w, b, x = random_layer(m, n, 60, seed)
    g, own = gradient_moment(m, seed, 3), b if bias else None
    plain = principal_basis(w, own, torch.cov(x, correction=0), x.mean(1), "layer", all_directions=True)
    basis = with_predicted_losses(plain, g, "layer")
    assert basis.losses is not None
    assert torch.equal(basis.directions, plain.directions)
    total = float(basis.losses.sum())
    for rank in range(1, min(m, n) + 1):
        expected = cost(residual(basis, rank, w, own, x), g)
        # Principal coefficients are uncorrelated, so the costs of the directions add up.
        assert float(basis.losses[rank:].sum()) == pytest.approx(expected, rel=1e-6, abs=1e-9 * total)


@pytest.mark.parametrize("size", [1e-12, 1.0, 1e6])
def test_the_size_of_the_gradients_changes_losses_and_no_factors(size: float) -> None:
    """Float16 holds the factors of any model: both are of the size of the principal basis, but for the gradients'."""
    w, b, x = random_layer(24, 16, 200, 0)
    g = gradient_moment(24, 0)
    one, other = fisher(w, b, x, g), fisher(w, b, x, size * g)
    assert torch.allclose(one.directions, other.directions, rtol=1e-8)
    assert torch.allclose(one.projection, other.projection, rtol=1e-8)
    assert torch.allclose(one.losses * size, other.losses, rtol=1e-8)
    sizes = (g.diagonal() / g.diagonal().mean()).sqrt()
    assert float((sizes[:, None] * one.directions).abs().max()) < 10  # at most (damping)^(-1/2)
    assert float(one.projection.abs().max()) < 10 * float((sizes[:, None] * w).norm())


@settings(max_examples=30, deadline=None)
@given(**SIZES, size=st.floats(-4, 4), few=st.booleans(), bias=st.booleans())
def test_scaling_an_output_changes_neither_losses_nor_the_map(
    m: int, n: int, seed: int, size: float, few: bool, bias: bool
) -> None:
    """What reads it by 1/a makes the network the same one; an output 10,000 times as large blinds no other."""
    w, b, x = random_layer(m, n, 60, seed)
    g, factors = gradient_moment(m, seed, 2 if few else None), torch.ones(m, dtype=torch.double)
    factors[seed % m], factors[(seed + 1) % m] = 10.0**size, -0.5
    one = fisher(w, b if bias else None, x, g)
    other = fisher(factors[:, None] * w, factors * b if bias else None, x, g / factors / factors[:, None])
    assert one.losses is not None
    assert other.losses is not None
    total = float(one.losses.sum())
    assert torch.allclose(one.losses, other.losses, rtol=1e-6, atol=1e-9 * total)
    for rank in {1, min(m, n) // 2, min(m, n)}:
        if rank < min(m, n) and float(one.losses[rank - 1] - one.losses[rank]) < 1e-3 * total:
            continue  # two directions of one loss: either is best
        errors = [residual(one, rank, w, b if bias else None, x)]
        errors.append(residual(other, rank, factors[:, None] * w, factors * b if bias else None, x) / factors[:, None])
        scale = (w @ x).abs().amax(1, keepdim=True)
        assert torch.allclose(errors[0] / scale, errors[1] / scale, atol=1e-5)


def test_outputs_without_gradient_cost_nothing_and_disturb_no_others() -> None:
    w, b, x = random_layer(12, 8, 60, 0)
    g = gradient_moment(12, 0)
    g[[2, 7]] = g[:, [2, 7]] = 0
    basis = fisher(w, b, x, g)
    assert basis.losses is not None
    metric = damped(g, 0.01)
    for seen in (2, 7):
        metric[seen, seen] = 0.01 * float(g.diagonal()[g.diagonal() > 0].min())
    for rank in (2, 5):
        assert cost(residual(basis, rank, w, b, x), metric) == pytest.approx(float(basis.losses[rank:].sum()), rel=1e-6)


def test_an_output_with_hardly_any_gradient_is_still_approximated() -> None:
    """A gate far below zero has gradients beyond any rounding; its output may matter elsewhere."""
    w, b, x = random_layer(24, 8, 200, 0)
    errors = []
    for size in (1e-6, 1e-16, 1e-19):
        scales = torch.ones(24, dtype=torch.double)
        scales[3] = size
        basis = fisher(w, b, x, scales * gradient_moment(24, 0) * scales[:, None])
        errors.append(float(residual(basis, 6, w, b, x)[3].square().mean() / (w @ x)[3].square().mean()))
    assert errors[1:] == pytest.approx([errors[0]] * 2, rel=0.2)


def test_a_block_stores_what_its_preset_asks_for() -> None:
    draw = torch.Generator().manual_seed(0)
    x, w = torch.randn(4, 20, 6, generator=draw), torch.randn(9, 6, generator=draw)
    moments = MomentAccumulator(6)
    moments.update(x, "x")
    linears, gradients = {"up": ("mlp", w, None)}, {"up": gradient_moment(9, 0).float()}

    def stored(preset: str) -> dict[str, torch.Tensor]:
        settings = Covariance(estimator="naive", gradients=preset)
        return bases_of_block(
            linears, {"mlp": moments.result()}, settings, CPU, "block", None if preset == "none" else gradients
        )

    none, predict, weigh = stored("none"), stored("predict"), stored("weigh")
    assert "up.losses" not in none
    assert none["up.directions"].shape == (9, 3)  # a pair of rank 3.6 is as large as the matrix
    assert predict["up.directions"].shape == weigh["up.directions"].shape == (9, 6)
    assert torch.equal(none["up.directions"], predict["up.directions"][:, :3])
    assert float(weigh["up.losses"].sum()) > 0
    assert bool((predict["up.losses"].flip(0).cumsum(0) >= weigh["up.losses"].flip(0).cumsum(0) * 0.9).all())


def test_damage_names_the_layer() -> None:
    w, b, x = random_layer(8, 8, 20, 1)
    with pytest.raises(RankwiseError, match=r"layers\.3, up: the loss has no gradient at its output"):
        fisher_basis(w, b, torch.cov(x), x.mean(1), torch.zeros(8, 8), 0.01, "layers.3, up")
    with pytest.raises(RankwiseError, match=r"layers\.3, up"):
        fisher_basis(w, b, torch.full((8, 8), float("nan")), x.mean(1), gradient_moment(8, 0), 0.01, "layers.3, up")


def test_a_small_error_costs_what_the_gradients_say(tmp_path: Path) -> None:
    """Second order: for small independent errors, the divergence from the dense model is 1/2 tr(G Cov(e)).

    With texts drawn from the model itself G is the Fisher information, so nothing else is neglected.
    """
    model, layer = tiny.model("llama-gqa").double(), "model.layers.0.mlp.up_proj"
    torch.manual_seed(0)
    prompt = torch.randint(2, 400, (256, 1))
    texts = model.generate(prompt, do_sample=True, max_new_tokens=31, min_new_tokens=31, top_k=0, eos_token_id=None)
    files = collect_output_gradients(model, texts, 2, tmp_path, CPU)
    g = load_output_gradients(files[0], ["up"])["up"].double()

    draw = torch.Generator().manual_seed(1)
    mix = torch.randn(len(g), len(g), generator=draw, dtype=torch.float64) / 8
    predicted = float(torch.trace(g @ mix @ mix.T)) / 2
    dense = model(texts).logits[:, :-1].log_softmax(-1)
    ratios = []
    for size in (0.2, 0.02):

        def disturb(module: object, args: object, y: torch.Tensor, size: float = size) -> torch.Tensor:
            return y + size * torch.randn(y.shape, generator=draw, dtype=torch.float64) @ mix.T

        handle = model.get_submodule(layer).register_forward_hook(disturb)
        found = model(texts).logits[:, :-1].log_softmax(-1)
        handle.remove()
        rise = functional.kl_div(found, dense, reduction="sum", log_target=True) / dense[..., 0].numel()
        ratios.append(float(rise) / (size**2 * predicted))
    assert ratios[1] == pytest.approx(1, abs=0.05)
    assert ratios[0] == pytest.approx(1, abs=0.5)


def test_without_a_gradient_nothing_is_predicted_and_the_layer_is_named() -> None:
    w, b, x = random_layer(6, 5, 60, 0)
    plain = principal_basis(w, b, torch.cov(x, correction=0), x.mean(1), "layer", all_directions=True)
    with pytest.raises(
        RankwiseError, match=r"^layer: the loss has no gradient at its output, so nothing says what to keep$"
    ):
        with_predicted_losses(plain, torch.zeros(6, 6), "layer")
    with pytest.raises(RankwiseError, match=r"what to keep: no window of gradients led there, take more"):
        with_predicted_losses(plain, torch.zeros(6, 6), "model.layers.0.mlp.experts.2.up_proj")
