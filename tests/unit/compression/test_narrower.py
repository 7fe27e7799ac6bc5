"""What the MLP of a block may become: each choice's parameters and loss by hand, in numpy and float64."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from lowrank.compression.branches import Structure
from lowrank.compression.compress import CompressionTask
from lowrank.compression.narrow_block import NarrowBlock
from lowrank.compression.narrower import Mlps
from lowrank.config.presets import Covariance
from lowrank.methods import rankwise
from lowrank.model.factors import LowRankFactors
from lowrank.model.replacements import Deferred, SmallerLinear
from lowrank.ranks.budget import Budget
from tests import tiny
from tests.unit.methods.rankwise_samples import bases_of, eliminations_of
from tests.unit.model import factor_samples as samples

DAMPING = 0.01
PRESET = Covariance.model_validate({"estimator": "naive", "gradients": "weigh", "damping": DAMPING})
KINDS = ("llama-gqa", "qwen2", "opt")


def task_of(kind: str, dtype: torch.dtype = torch.float32) -> CompressionTask:
    calibrated = samples.statistics(kind), samples.output_gradients(kind)
    settings = rankwise.Settings(kind="rankwise", calibration="c", covariance="c", mlp="both")
    return CompressionTask(
        settings=settings,
        model=tiny.model(kind).to(dtype),
        budget=replace(Budget.of(samples.shape_of(kind)), identity_block=True, adds_bias=True),
        ratio=60,
        seed=0,
        bases=bases_of(tiny.model(kind), kind, samples.TOKENS, PRESET),
        covariance=PRESET,
        statistics=calibrated[0],
        gradients=calibrated[1],
        eliminations=eliminations_of(tiny.model(kind).to(dtype), kind, calibrated, PRESET, settings.multiple),
    )


def left_out(weight: np.ndarray, covariance: np.ndarray, gradient: np.ndarray, rank: int | None) -> float:
    """1/2 the sum of the eigenvalues of M W C W' M' beyond a rank, with M'M = G + eps diag(G)."""
    if rank is None:
        return 0.0
    damped = gradient + DAMPING * np.diag(np.diag(gradient))
    values = np.linalg.eigvals(damped @ weight @ covariance @ weight.T).real
    return float(np.sort(values)[::-1][rank:].sum()) / 2


def cost_of(out: int, inputs: int, rank: int | None, bias: bool) -> int:
    """Numbers of a layer: a plain matrix, or a pair with an identity block, its indices and a bias."""
    if rank is None:
        return out * inputs + (out if bias else 0)
    return rank * (out + inputs - rank) + rank + out


@pytest.mark.parametrize("kind", KINDS)
def test_choices_cost_and_hold_what_their_layers_do(kind: str) -> None:
    task, shape = task_of(kind), samples.shape_of(kind)
    structure, native = Structure.of(task.budget), kind == "opt"
    mlps = Mlps(task, 8, one_width=False, pairs=True)
    groups = mlps.groups()
    (name, group), *_ = groups.items()
    moments, gradients = task.required_statistics().of(0), task.required_gradients().of(0)
    modules = structure.modules(0, structure.mlp)
    block = NarrowBlock(modules, samples.layers_in(task.model)(modules), moments, gradients, PRESET, samples.CPU)
    elimination = block.neurons.eliminate()
    first, *_, last = (module.type for module in block.modules)
    read, neurons = (moments[site.site].estimate(PRESET)[0].double().numpy() for site in (first, last))
    of_pairs = 0
    for index in range(len(group.losses)):
        choice = mlps.chosen({each: index if each == name else 0 for each in groups})[0]
        kept = elimination.kept(choice.neurons)
        gone = shape.intermediate - choice.neurons
        loss, size = float(elimination.losses[gone]), 0
        for part, rank in zip(block.parts(kept), choice.ranks, strict=True):
            reader, kind_of = part.module.type == last, part.module.type.name
            rows = slice(None) if reader else kept.numpy()
            g = gradients[kind_of].double().numpy()
            g = g if reader else g[np.ix_(rows, rows)]
            c = neurons[np.ix_(kept.numpy(), kept.numpy())] if reader else read
            loss += left_out(part.weight.numpy(), c, g, rank)
            out, inputs = part.weight.shape
            assert (out, inputs) == ((shape.hidden, len(kept)) if reader else (len(kept), shape.hidden))
            size += cost_of(out, inputs, rank, bias=reader and gone > 0 and not native)
            # A layer's own biases are no linear weights; those that pairs bring are counted only where there are none.
            size -= out if rank is not None and native else 0
            of_pairs += rank is not None and gone > 0
        assert group.parameters[index] == size, choice
        assert group.losses[index] == pytest.approx(loss, rel=1e-4, abs=1e-9), choice
    assert of_pairs


def test_what_waits_is_as_small_as_what_is_written() -> None:
    """Plain matrices in the model's dtype, pairs in float32, both in main memory."""
    task = task_of("llama-gqa", torch.bfloat16)
    mlps = Mlps(task, 8, one_width=False, pairs=True)
    groups = mlps.groups()
    dtypes = set()
    for index in range(max(len(group.losses) for group in groups.values())):
        picked = {name: min(index, len(group.losses) - 1) for name, group in groups.items()}
        made = mlps.replacements(picked)
        assert isinstance(made, Deferred)
        for layer in made.values():
            assert isinstance(layer, SmallerLinear | LowRankFactors)
            weight = layer.weight if isinstance(layer, SmallerLinear) else layer.up
            dtypes.add((type(layer), weight.dtype))
        if index > 40:
            break
    assert dtypes == {(SmallerLinear, torch.bfloat16), (LowRankFactors, torch.float32)}
