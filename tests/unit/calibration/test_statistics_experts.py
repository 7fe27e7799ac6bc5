"""Moments of what each expert reads, against a float64 forward pass in which tokens are routed by hand."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from lowrank.calibration import statistics
from lowrank.calibration.moments import RoutedAccumulator
from lowrank.calibration.routing import TOKENS, experts_left_dense
from lowrank.calibration.statistics import collect_statistics, load_moments
from lowrank.config.presets import Covariance
from lowrank.config.sources import ModelShape
from lowrank.jobs.share import Share
from lowrank.manifest import load_layer
from lowrank.model.checkpoint import family_of
from lowrank.ranks.budget import Budget
from tests import tiny

CPU = torch.device("cpu")
WINDOWS, LENGTH = 6, 20


def some_tokens() -> torch.Tensor:
    return torch.randint(2, 400, (WINDOWS, LENGTH), generator=torch.Generator().manual_seed(1))


def routed_by_hand(kind: str, tokens: torch.Tensor) -> dict[tuple[int, int], list[tuple[int, np.ndarray, np.ndarray]]]:
    """(block, expert) -> (window, what gate and up read, what down reads) of each token that it gets, in float64.

    From the stacked matrices of transformers' own model and its router's weights; no code of this project.
    """
    config = tiny.model(kind).config
    torch.manual_seed(0)  # as `tiny.model` does
    stock = AutoModelForCausalLM.from_config(config, experts_implementation="eager").eval().double()
    found: dict[tuple[int, int], list[tuple[int, np.ndarray, np.ndarray]]] = {}
    for layer, block in enumerate(stock.model.layers):

        def look(module: Any, args: Any, layer: int = layer) -> None:
            matrices = [p.detach().numpy() for p in (module.gate.weight, module.experts.gate_up_proj)]
            for window, rows in enumerate(args[0].detach().numpy()):
                for x in rows:
                    scores = matrices[0] @ x
                    for expert in np.argsort(scores)[-2:]:
                        gate, up = np.split(matrices[1][expert] @ x, 2)
                        found.setdefault((layer, int(expert)), []).append((window, x, gate / (1 + np.exp(-gate)) * up))

        block.mlp.register_forward_pre_hook(look)
    with torch.no_grad():
        stock(tokens)
    return found


@pytest.mark.parametrize("kind", tiny.MIXTURES)
@pytest.mark.parametrize(
    ("layers_per_pass", "length", "batch"), [(1, LENGTH, 2 * LENGTH), (2, LENGTH, 2 * LENGTH), (1, 2, 2)]
)  # three batches; and many, in which not every expert gets a token
def test_statistics_are_those_of_the_tokens_that_are_routed_to_an_expert(
    kind: str, layers_per_pass: int, length: int, batch: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens, model = some_tokens().reshape(-1, length), tiny.model(kind)
    by_hand = routed_by_hand(kind, tokens)
    monkeypatch.setattr(statistics, "TOKENS_PER_BATCH", batch)
    files = collect_statistics(model, tokens, layers_per_pass, tmp_path, CPU, expert_tokens=2)
    seen = 0
    for layer, file in enumerate(files):
        counts = load_layer(file)[TOKENS].tolist()
        assert counts == [len(by_hand.get((layer, expert), [])) for expert in range(4)]
        assert sum(counts) == 2 * tokens.numel()
        moments = load_moments(file, family_of(model).sites)
        for expert, count in enumerate(counts):
            if count < 2:
                assert f"mlp.{expert}" not in moments
                continue
            seen += 1
            windows, *inputs = zip(*by_hand[layer, expert], strict=True)
            for site, x in zip((f"mlp.{expert}", f"mlp_output.{expert}"), map(np.array, inputs), strict=True):
                close = {"atol": 1e-5 * np.abs(x).max() ** 2}
                found = moments[site]
                assert found.tokens == count
                assert np.allclose(found.estimate(Covariance(estimator="naive"))[0], np.cov(x.T), **close)
                assert np.allclose(found.estimate(Covariance(estimator="uncentred"))[0], x.T @ x / count, **close)
                assert np.allclose(found.mean, x.mean(0), atol=1e-5)
                assert np.allclose(found.absolute_mean, np.abs(x).mean(0), atol=1e-5)
                pooled, _ = found.estimate(Covariance(estimator="pooled", groups=3))
                assert np.allclose(pooled, pooled_by_hand(x, np.array(windows) * 3 // len(tokens)), **close)
    assert seen > 4


def pooled_by_hand(x: np.ndarray, group: np.ndarray) -> np.ndarray:
    """Scatter around the mean of each group that has tokens, over the degrees of freedom."""
    parts = [x[group == each] for each in np.unique(group)]
    scatter = sum((part - part.mean(0)).T @ (part - part.mean(0)) for part in parts)
    return np.asarray(scatter / (len(x) - len(parts)))


@pytest.mark.parametrize("kind", tiny.MIXTURES)
def test_an_expert_without_tokens_is_named_and_has_no_statistics(
    kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model, shape = tiny.model(kind), ModelShape(**tiny.shape(kind))
    gate = model.model.layers[1].mlp.gate

    def never_the_third(module: Any, args: Any, output: Any) -> Any:
        logits = args[0] @ module.weight.T
        logits[:, 2] = -torch.inf
        weights, index = logits.softmax(-1).topk(2)
        return logits, weights, index

    gate.register_forward_hook(never_the_third)
    files = collect_statistics(model, some_tokens(), 2, tmp_path, CPU, expert_tokens=1)
    assert experts_left_dense(files, Budget.of(shape)) == {"model.layers.1.mlp.experts.2": 0}
    assert "model.layers.1.mlp.experts.2 got 0 tokens, fewer than 1: its matrices stay dense" in caplog.text
    moments = load_moments(files[1], family_of(model).sites)
    assert not {"mlp.2", "mlp_output.2"} & set(moments)
    assert {"mlp.1", "mlp_output.1", "attention"} <= set(moments)


def test_the_least_number_of_tokens_is_that_of_the_widest_input(tmp_path: Path) -> None:
    model, shape = tiny.model("qwen3_moe"), ModelShape(**tiny.shape("qwen3_moe"))
    files = collect_statistics(model, some_tokens(), 2, tmp_path, CPU)
    counts = [load_layer(file)[TOKENS].tolist() for file in files]
    few = {
        f"model.layers.{layer}.mlp.experts.{expert}": count
        for layer, of_block in enumerate(counts)
        for expert, count in enumerate(of_block)
        if count < max(shape.hidden, shape.intermediate)
    }
    assert experts_left_dense(files, Budget.of(shape)) == few
    assert few


class Remembered(Share):
    """A process whose sums are of itself and of another, which ran before."""

    def __init__(self, others: list[torch.Tensor] | None) -> None:
        super().__init__(rank=0, world=2)
        object.__setattr__(self, "others", others)
        object.__setattr__(self, "parts", [])

    def sum(self, part: torch.Tensor) -> torch.Tensor:
        self.parts.append(part.clone())
        if self.others is not None:
            part += self.others.pop(0)
        return part


def test_what_two_processes_saw_of_an_expert_is_put_together() -> None:
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(30, 5, generator=draw)
    windows = torch.randint(0, 4, (30,), generator=draw)
    windows[windows == 2] = 3  # a window without tokens
    whole, first, second = (RoutedAccumulator(5) for _ in range(3))
    whole.update_routed(x, windows, 4, "here")
    first.update_routed(x[windows < 3], windows[windows < 3], 3, "here")
    second.update_routed(x[windows == 3], windows[windows == 3] - 3, 1, "here")
    other = Remembered(None)
    second.add_up(other, 3, 4, 9)
    first.add_up(Remembered(other.parts), 0, 4, 9)
    one, both = whole.result(), first.result()
    assert torch.equal(one.window_length, both.window_length)
    for name in ("within", "window_means", "absolute_mean"):
        assert torch.allclose(getattr(one, name), getattr(both, name))
    assert both.tokens == 30
