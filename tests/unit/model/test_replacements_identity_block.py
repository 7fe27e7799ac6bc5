"""Pairs with an identity block: the same map as the plain pair, with fewer weights, in checkpoints and in training."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedModel

from lowrank.errors import RankwiseError
from lowrank.evaluation.cost import count_macs
from lowrank.files import save_tensors
from lowrank.model.checkpoint import recipe_of, replace_modules, save_checkpoint
from lowrank.model.factors import LowRankFactors
from lowrank.model.modeling_rankwise import IdentityBlockLinear
from lowrank.model.parameters import count_parameters
from lowrank.model.replacements import IdentityBlockFactors, Replacement
from lowrank.post_training.adapters import learnt_by
from lowrank.post_training.subspace import (
    ScaledSubspaceLinear,
    SubspaceVectors,
    attach_subspaces,
    merge_subspaces,
    pack_vectors,
    second_factor,
    unpack_vectors,
)
from lowrank.ranks.budget import Budget
from tests import tiny
from tests.unit.model.factor_samples import check_round_trip, shape_of
from tests.unit.model.test_replacements import OUTSIDE, probe

KINDS = tuple(tiny.FEW)
RANK = 24


def random_factors(m: int, n: int, rank: int, seed: int, bias: bool = True) -> LowRankFactors:
    """A pair whose rank dimensions are of very different sizes, as those of Fisher bases are."""
    draw = torch.Generator().manual_seed(seed)
    down, up = (torch.randn(*size, generator=draw, dtype=torch.float64) for size in ((rank, n), (m, rank)))
    sizes = torch.logspace(-4, 4, rank, dtype=torch.float64)[torch.randperm(rank, generator=draw)]
    return LowRankFactors(
        down / sizes[:, None], up * sizes, torch.randn(m, generator=draw, dtype=torch.float64) if bias else None
    )


def with_identity_blocks(kind: str, dtype: torch.dtype = torch.float32, rank: int = RANK) -> PreTrainedModel:
    """A tiny model all of whose linear layers are such pairs: rank-r parts of their own weights, and random biases."""
    model = tiny.model(kind)
    replacements: dict[str, Replacement] = {}
    for seed, module in enumerate(Budget.of(shape_of(kind)).modules):
        weight = model.get_submodule(module.name).weight.double()
        u, s, v = torch.linalg.svd(weight, full_matrices=False)
        bias = torch.randn(len(weight), generator=torch.Generator().manual_seed(seed)) / 10
        pair = LowRankFactors(s[:rank, None] * v[:rank], u[:, :rank], bias)
        replacements[module.name] = IdentityBlockFactors.of(pair, module.name)
    for parameter in model.parameters():  # the tables of positions stay in float32, as in a model that is opened
        parameter.data = parameter.data.to(dtype)
    replace_modules(model, replacements)
    return model


@settings(max_examples=60, deadline=None)
@given(m=st.integers(1, 30), n=st.integers(1, 30), share=st.floats(0, 1), bias=st.booleans(), seed=st.integers(0, 999))
def test_it_is_the_same_map(m: int, n: int, share: float, bias: bool, seed: int) -> None:
    rank = 1 + int(share * (min(m, n) - 1))
    plain = random_factors(m, n, rank, seed, bias)
    block = IdentityBlockFactors.of(plain, "layer")
    assert block.rank == rank
    assert block.rows.tolist() == sorted(set(block.rows.tolist()))
    assert block.rest.shape == (m - rank, rank)
    x = torch.randn(3, 2, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    expected = plain.as_module(torch.float64)(x)
    found = block.as_module(torch.float64)(x)
    assert torch.allclose(found, expected, rtol=0, atol=1e-10 * float(expected.abs().max() + 1))
    with torch.inference_mode():
        assert torch.equal(block.as_module(torch.float64)(x), found)
    product = torch.zeros(m, n, dtype=torch.float64)
    others = [row for row in range(m) if row not in block.rows.tolist()]
    product[block.rows.long()] = block.down
    product[others] = block.rest @ block.down
    exact = plain.up @ plain.down
    assert torch.allclose(product, exact, rtol=0, atol=1e-10 * float(exact.abs().max()))


@pytest.mark.parametrize(("m", "n", "rank"), [(576, 192, 100), (192, 576, 141), (300, 300, 200)])
def test_its_weights_are_of_the_size_of_the_identity(m: int, n: int, rank: int) -> None:
    """So half precision does it no more harm than the plain pair."""
    block = IdentityBlockFactors.of(random_factors(m, n, rank, 0), "layer")
    assert float(block.rest.abs().max()) < 4


def test_a_factor_without_full_rank_is_refused_by_name() -> None:
    plain = random_factors(8, 6, 3, 0)
    twice = torch.cat([plain.up[:, :2], plain.up[:, :1]], dim=1)
    with pytest.raises(RankwiseError, match=r"layers\.3, up: its factor of rank 3 has not full rank"):
        IdentityBlockFactors.of(LowRankFactors(plain.down, twice), "layers.3, up")
    zero = plain.up * torch.tensor([1.0, 0.0, 1.0])
    with pytest.raises(RankwiseError, match="has not full rank"):
        IdentityBlockFactors.of(LowRankFactors(plain.down, zero), "layer")
    with pytest.raises(RankwiseError, match="factor of rank 6 has not full rank"):
        IdentityBlockFactors.of(random_factors(4, 9, 6, 0), "layer")


def test_places_follow_the_rows_whatever_changes_them() -> None:
    layer = IdentityBlockFactors.of(random_factors(6, 5, 2, 0), "layer").as_module(torch.float64)
    assert isinstance(layer, IdentityBlockLinear)
    x = torch.randn(4, 5, dtype=torch.float64)

    def expected() -> torch.Tensor:
        z, y = layer.down(x), torch.empty(4, 6, dtype=torch.float64)
        y[:, layer.rows.long()] = z
        y[:, [row for row in range(6) if row not in layer.rows.tolist()]] = layer.rest(z)
        return y + layer.bias

    with torch.inference_mode():
        assert torch.equal(layer(x), expected())
    places = layer.places()
    layer(x)
    assert layer.places() is places  # computed once
    layer.rows.copy_(torch.tensor([0, 5]))
    assert torch.equal(layer(x), expected())
    layer.rows = torch.tensor([2, 3], dtype=torch.int32)
    assert torch.equal(layer(x), expected())
    layer.load_state_dict({**layer.state_dict(), "rows": torch.tensor([1, 4], dtype=torch.int32)})
    assert torch.equal(layer(x), expected())
    assert layer._placed is not None
    layer._placed = (*layer._placed[:2], layer._placed[2].to("meta"))  # as if `rows.data` had come to the CPU
    assert torch.equal(layer(x), expected())
    other = copy.deepcopy(layer)
    other.rows.copy_(torch.tensor([0, 1]))
    assert torch.equal(layer(x), expected())
    assert not torch.equal(other(x), layer(x))
    assert list(layer.state_dict()) == ["bias", "rows", "down.weight", "rest.weight"]
    layer.rest.weight.requires_grad_(True)  # after an inference pass, gradients still flow
    layer(x).sum().backward()
    assert layer.rest.weight.grad is not None


@pytest.mark.parametrize("kind", KINDS)
def test_parameters_indices_and_arithmetic_are_counted(kind: str) -> None:
    model, shape, dense = with_identity_blocks(kind), shape_of(kind), tiny.model(kind)
    kept, weights, total = 0, 0, sum(p.numel() for p in dense.parameters())
    for module in Budget.of(shape).modules:
        m, n = module.out_features, module.in_features
        had_bias = dense.get_submodule(module.name).bias is not None
        kept += RANK * (m + n - RANK) + RANK + (0 if had_bias else m)
        weights += RANK * (m + n - RANK)
        total += RANK * (m + n - RANK) + RANK - m * n + (0 if had_bias else m)
    counts = count_parameters(model, shape)
    assert counts["decoder_linears"] == kept
    assert counts["total"] == total
    assert count_macs(model, shape, 16)["linears"] == 16 * weights
    layer, x = model.get_submodule(Budget.of(shape).modules[0].name), torch.randn(16, tiny.HIDDEN)
    with FlopCounterMode(display=False) as counter:
        layer(x)
    m = layer.out_features
    assert counter.get_total_flops() == 2 * 16 * RANK * (m + tiny.HIDDEN - RANK)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_checkpoints_read_back_with_equal_logits_and_generate(kind: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model = with_identity_blocks(kind, dtype)
    assert {entry["kind"] for entry in recipe_of(model).values()} == {"identity_block"}
    check_round_trip(model, tmp_path)


def test_checkpoints_open_in_a_process_without_the_repository(tmp_path: Path) -> None:
    tiny.tokenizer().save_pretrained(tmp_path / "tokenizer")
    folders = []
    for kind, dtype in (*((kind, torch.float32) for kind in KINDS), ("llama-gqa", torch.bfloat16)):
        model = with_identity_blocks(kind, dtype)
        folder = tmp_path / f"{kind}-{dtype}".replace("torch.", "")
        save_checkpoint(model, tmp_path / "tokenizer", folder)
        with torch.inference_mode():
            logits = model(probe()).logits.contiguous()
            generated = model.generate(probe(), max_new_tokens=5, min_new_tokens=5, do_sample=False, use_cache=True)
        save_tensors(folder / "probe.safetensors", {"ids": probe(), "logits": logits, "generated": generated})
        folders.append(folder)
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environment |= {"HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(tmp_path / "modules")}
    command = [sys.executable, "-c", OUTSIDE, *map(str, folders)]
    run = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    answers = json.loads(run.stdout.splitlines()[-1])
    assert len(answers) == len(folders)
    for answer in answers.values():
        assert answer["class"].startswith("transformers_modules.")
        assert answer["logits"]
        assert answer["generated"]


def test_a_pair_without_bias_and_one_of_full_rank_run() -> None:
    plain = random_factors(5, 9, 5, 3, bias=False)
    layer = IdentityBlockFactors.of(plain, "layer").as_module(torch.float64)
    x = torch.randn(2, 9, dtype=torch.float64)
    assert isinstance(layer, IdentityBlockLinear)
    assert layer.rest.weight.shape == (0, 5)
    assert torch.allclose(layer(x), nn.functional.linear(x, plain.up @ plain.down))


@pytest.mark.parametrize("bias", [True, False])
def test_scaled_subspaces_train_the_same_map_as_of_the_plain_pair_and_merge_exactly(bias: bool) -> None:
    block = IdentityBlockFactors.of(random_factors(14, 9, 6, 2, bias), "layer").as_module(torch.float64)
    assert isinstance(block, IdentityBlockLinear)
    plain = LowRankFactors(block.down.weight, second_factor(block), block.bias).as_module(torch.float64)
    indices, x = torch.tensor([0, 2, 5]), torch.randn(2, 3, 9, dtype=torch.float64)
    wrappers = [ScaledSubspaceLinear(layer, indices) for layer in (block, plain)]
    assert torch.allclose(wrappers[0](x), block(x), rtol=0, atol=0)  # training starts where compression ended
    for wrapper in wrappers:
        for seed, vector in enumerate((wrapper.inner, wrapper.outer)):
            vector.data = torch.randn(len(vector), generator=torch.Generator().manual_seed(seed)).double() / 2
    expected = wrappers[1](x)
    assert torch.allclose(wrappers[0](x), expected, rtol=0, atol=1e-12)
    assert not torch.allclose(block(x), expected, atol=0.1)
    wrappers[0](x).sum().backward()
    assert wrappers[0].inner.grad is not None
    rows = block.rows.clone()
    merge_subspaces(nn.Sequential(block), {"0": learnt_by(wrappers[0])})  # type: ignore[dict-item]
    assert torch.allclose(block(x), expected, rtol=0, atol=1e-11)
    assert torch.equal(block.rows, rows)


def test_a_merge_that_would_lose_the_identity_chooses_other_rows() -> None:
    block = IdentityBlockFactors.of(random_factors(14, 9, 6, 2), "layer").as_module(torch.float64)
    assert isinstance(block, IdentityBlockLinear)
    x, before = torch.randn(3, 9, dtype=torch.float64), block.rows.clone()
    wrapper = ScaledSubspaceLinear(block, torch.tensor([1, 4]))
    wrapper.inner.data[:] = 1.0
    wrapper.outer.data[int(before[4])] = -1.0  # this output no longer is what the fifth row of `down` gives
    expected = wrapper(x)
    merge_subspaces(nn.Sequential(block), {"0": learnt_by(wrapper)})  # type: ignore[dict-item]
    assert torch.allclose(block(x), expected, rtol=0, atol=1e-11)
    assert not torch.equal(block.rows, before)

    lost = SubspaceVectors(torch.arange(6), torch.ones(6), -torch.ones(14))
    with pytest.raises(RankwiseError, match=r"model\.up: its factor of rank 6 has not full rank"):
        merge_subspaces(nn.ModuleDict({"model": nn.ModuleDict({"up": block})}), {"model.up": lost})


def test_a_model_of_such_pairs_is_trained_and_merged() -> None:
    model, merged = with_identity_blocks("qwen2").double(), with_identity_blocks("qwen2").double()
    ids, recipe = probe(), recipe_of(merged)
    before = model(ids).logits
    wrapped = attach_subspaces(model, 8, "random", seed=0)
    assert set(wrapped) == set(recipe)
    assert torch.equal(model(ids).logits, before)
    for seed, wrapper in enumerate(wrapped.values()):
        draw = torch.Generator().manual_seed(seed)
        wrapper.inner.data += torch.randn(8, generator=draw) / 4
        wrapper.outer.data += torch.randn(len(wrapper.outer), generator=draw) / 4
    packed = pack_vectors({name: learnt_by(wrapper) for name, wrapper in wrapped.items()})
    merge_subspaces(merged, unpack_vectors(packed))
    assert torch.allclose(merged(ids).logits, model(ids).logits, rtol=0, atol=1e-9)
    assert not torch.allclose(merged(ids).logits, before, atol=0.1)
    assert recipe_of(merged) == recipe


def test_dimensions_of_an_identity_block_have_no_order() -> None:
    for strategy in ("top", "bottom"):
        with pytest.raises(RankwiseError, match=rf"q_proj: .*`subspace: {strategy}` means nothing"):
            attach_subspaces(with_identity_blocks("llama"), 8, strategy, seed=0)  # type: ignore[arg-type]
