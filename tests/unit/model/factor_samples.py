"""Tiny models, their statistics, and the checks that every method of one uniform budget has to pass."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from lowrank.bases.block import bases_of_block, linears_of
from lowrank.bases.principal import Bases
from lowrank.calibration.output_gradients import OutputGradients, collect_output_gradients
from lowrank.calibration.routing import about_experts
from lowrank.calibration.statistics import Statistics, collect_statistics, load_moments
from lowrank.compression.compress import compress_model
from lowrank.config.presets import Covariance
from lowrank.config.sources import ModelShape
from lowrank.files import layer_name, save_tensors
from lowrank.jobs.state import Parts
from lowrank.model.checkpoint import family_of, load_checkpoint, save_checkpoint
from lowrank.model.families import LinearModule
from lowrank.model.parameters import count_parameters
from lowrank.model.stored_blocks import Layer
from lowrank.ranks.budget import ALIGNMENT, Budget, Ranks
from lowrank.ranks.reach import largest_rank_worth_it
from tests import tiny

CPU = torch.device("cpu")
_FOLDER = tempfile.TemporaryDirectory(prefix="factor-samples-")
TOKENS = torch.randint(2, 400, (12, 32), generator=torch.Generator().manual_seed(5))


def shape_of(kind: str) -> ModelShape:
    return ModelShape(**tiny.shape(kind))


@cache
def statistics(kind: str, double: bool = False) -> Statistics:
    """The moments of a tiny model on `TOKENS`; of one in float64 where a rank must not hang on the last digits."""
    folder = Path(_FOLDER.name) / f"statistics-{double}" / kind
    folder.mkdir(parents=True)
    model = tiny.model(kind)
    collect_statistics(model.double() if double else model, TOKENS, 2, folder, CPU)
    return Statistics(folder, shape_of(kind))


@cache
def output_gradients(kind: str) -> OutputGradients:
    """The second moments of the loss gradients of a tiny model on `TOKENS`."""
    folder = Path(_FOLDER.name) / "gradients" / kind
    folder.mkdir(parents=True)
    collect_output_gradients(tiny.model(kind), TOKENS, 2, folder, CPU)
    return OutputGradients(folder, shape_of(kind))


@cache
def bases(kind: str, estimator: str) -> Bases:
    """The bases of a tiny model on `TOKENS`."""
    folder = Path(_FOLDER.name) / "bases" / kind / estimator
    folder.mkdir(parents=True)
    model = tiny.model(kind)
    family = family_of(model)
    for layer in range(tiny.LAYERS):
        block = model.get_submodule(f"{family.blocks}.{layer}")
        file = Path(statistics(kind).folder) / layer_name(layer)
        moments = load_moments(file, family.sites)
        linears = linears_of(block, family, moments)
        stored = bases_of_block(linears, moments, Covariance(estimator=estimator), CPU, "block")
        save_tensors(folder / layer_name(layer), stored | about_experts(file, family))
    return Bases(folder, tiny.LAYERS)


def layers_in(model: PreTrainedModel) -> Callable[[Sequence[LinearModule]], list[Layer]]:
    """From layers to their weights and biases in a model."""
    return lambda modules: [(each.weight, each.bias) for each in (model.get_submodule(m.name) for m in modules)]


def compressed(
    method: str,
    kind: str,
    ratio: int,
    model: PreTrainedModel | None = None,
    tokens: torch.Tensor = TOKENS,
    seed: int = 0,
    estimator: str = "naive",
    moments: Statistics | None = None,
    given_bases: Bases | None = None,
    gradients: OutputGradients | None = None,
    account: dict[str, Any] | None = None,
    finished_parts: Parts | None = None,
    **settings: Any,
) -> tuple[PreTrainedModel, Ranks]:
    """A tiny model after a method, and its ranks."""
    model = model or tiny.model(kind)
    given = {
        "model": model,
        "budget": Budget.of(shape_of(kind)),
        "ratio": ratio,
        "seed": seed,
        "statistics": moments or statistics(kind),
        "tokens": tokens,
        "gradients": gradients,
        "account": {} if account is None else account,
        "parts": finished_parts,
    }
    if given_bases is not None:
        given["bases"] = given_bases
    elif method == "afm":
        given["bases"] = bases(kind, estimator)
        settings["covariance"] = estimator
    named = {} if method == "svd" else {"calibration": "c"}
    return model, compress_model(method, {"kind": method, **named, **settings}, given)


def inputs_of_layers(model: PreTrainedModel, tokens: torch.Tensor = TOKENS) -> dict[str, torch.Tensor]:
    """What every linear layer of the blocks reads in one plain pass, tokens x n in float64."""
    family, seen, handles = family_of(model), {}, []
    for layer in range(tiny.LAYERS):
        for linear in family.types:
            name = f"{family.blocks}.{layer}.{linear.path}"

            def keep(module: torch.nn.Module, args: tuple[torch.Tensor, ...], name: str = name) -> None:
                seen[name] = args[0].detach().double().flatten(0, -2)

            handles.append(model.get_submodule(name).register_forward_pre_hook(keep))
    model(tokens)
    for handle in handles:
        handle.remove()
    return seen


def product(model: PreTrainedModel, name: str) -> torch.Tensor:
    """up down of a factorised layer, in float64."""
    layer = model.get_submodule(name)
    return layer.up.weight.double() @ layer.down.weight.double()


def truncation(matrix: torch.Tensor, rank: int) -> torch.Tensor:
    """The best approximation of a rank, by numpy's singular value decomposition."""
    u, s, vh = np.linalg.svd(matrix.double().numpy(), full_matrices=False)
    return torch.from_numpy((u[:, :rank] * s[:rank]) @ vh[:rank])


def check_unchanged_at_ratio_zero(method: str, kind: str, **settings: Any) -> None:
    dense = tiny.model(kind)
    model, ranks = compressed(method, kind, 0, **settings)
    assert not any(ranks.values())
    assert torch.equal(model(TOKENS).logits, dense(TOKENS).logits)


def check_budget(method: str, kind: str, ratio: int, adds_bias: bool = False, **settings: Any) -> None:
    """What the model holds is what its shapes say, and at most a step of 8 in all layers of a type below the budget."""
    shape = shape_of(kind)
    model, ranks = compressed(method, kind, ratio, **settings)
    budget = replace(Budget.of(shape), adds_bias=adds_bias)
    by_shapes = 0
    for module in budget.modules:
        m, n, rank = module.out_features, module.in_features, ranks[module.name]
        had_bias = tiny.model(kind).get_submodule(module.name).bias is not None
        by_shapes += m * n if rank is None else rank * (m + n) + (m if adds_bias and not had_bias else 0)
    counts = count_parameters(model, shape)
    assert counts["decoder_linears"] == by_shapes
    assert by_shapes <= (1 - ratio / 100) * counts["decoder_linears_dense"]
    assert counts["total_dense"] - counts["total"] == counts["decoder_linears_dense"] - by_shapes
    missing = (1 - ratio / 100) * counts["decoder_linears_dense"] - by_shapes
    layers = tiny.LAYERS
    steps = [
        layers * (budget.cost(module, (ranks[module.name] or 0) + ALIGNMENT) - budget.cost(module, ranks[module.name]))
        for module in budget.modules
        if (rank := ranks[module.name]) is not None and rank + ALIGNMENT <= largest_rank_worth_it(budget, module)
    ]
    assert not steps or missing <= max(steps)


def check_left_dense(method: str, kind: str, ratio: int, **settings: Any) -> None:
    """Values, which would be compressed, stay dense where a preset says so."""
    for uncompressed in ([], ["v"]):
        _, ranks = compressed(method, kind, ratio, uncompressed=uncompressed, **settings)
        assert any(rank for name, rank in ranks.items() if name.endswith("v_proj")) == (not uncompressed)
        assert any(ranks.values())


def check_round_trip(model: PreTrainedModel, folder: Path) -> None:
    """A checkpoint gives the same logits, and generation is the same with a cache and without."""
    source = folder / "source"
    source.mkdir()
    tiny.tokenizer().save_pretrained(source)
    save_checkpoint(model, source, folder / "checkpoint")
    loaded = load_checkpoint(folder / "checkpoint", model.dtype)
    assert torch.equal(loaded(TOKENS).logits, model(TOKENS).logits)
    prompt = TOKENS[:2, :8]
    if model.dtype == torch.bfloat16:  # with a cache other kernels run, whose last digit may decide between two tokens
        loaded = loaded.float()
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 1}
    cached = loaded.generate(prompt, use_cache=True, **options)
    assert cached.shape == (2, 14)
    assert torch.equal(cached, loaded.generate(prompt, use_cache=False, **options))
