"""Models whose blocks have experts: separated they compute what transformers does, and are stored as it stores them."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from lowrank.config.sources import Model, ModelShape
from lowrank.errors import RankwiseError
from lowrank.export.dense import stock_model, write_stock
from lowrank.export.gguf import write_gguf
from lowrank.model.checkpoint import load_checkpoint, replace_modules, save_checkpoint
from lowrank.model.factors import LowRankFactors
from lowrank.model.families import FAMILIES, family_for, linear_modules
from lowrank.model.modeling_rankwise import SeparateExperts, separate_projections
from lowrank.model.parameters import count_parameters
from lowrank.model.replacements import IdentityBlockFactors
from lowrank.model.shapes import shape_numbers
from lowrank.ranks.budget import Budget, rank_for
from lowrank.sources.checks import check_checkpoint
from lowrank.sources.random import make_random_checkpoint
from tests import tiny

IDS = torch.randint(2, 400, (3, 17), generator=torch.Generator().manual_seed(4))
each_mixture = pytest.mark.parametrize("kind", tiny.MIXTURES)


def stock(kind: str) -> PreTrainedModel:
    """transformers' own model with stacked experts, with the weights of `tiny.model`."""
    config = tiny.model(kind).config
    torch.manual_seed(0)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, experts_implementation="eager").eval()
    return model


def with_pairs(kind: str, bias: bool = False, identity: bool = False) -> PreTrainedModel:
    """A tiny model with a pair for every second of its matrices, of any expert."""
    model, draw = tiny.model(kind), torch.Generator().manual_seed(2)
    changed: dict[str, Any] = {}
    for module in list(linear_modules(ModelShape(**tiny.shape(kind))))[::2]:
        m, n = module.out_features, module.in_features
        pair = LowRankFactors(
            torch.randn(8, n, generator=draw) / 8,
            torch.randn(m, 8, generator=draw) / 8,
            torch.randn(m, generator=draw) if bias else None,
        )
        changed[module.name] = IdentityBlockFactors.of(pair, module.name) if identity else pair
    replace_modules(model, changed)
    return model


@each_mixture
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_separate_experts_compute_what_stacked_ones_do(kind: str, dtype: torch.dtype) -> None:
    stacked, separate = stock(kind).to(dtype), stock(kind).to(dtype)
    separate_projections(separate)
    assert [type(block.mlp.experts) for block in separate.model.layers] == [SeparateExperts] * tiny.LAYERS
    assert torch.equal(separate(IDS).logits, stacked(IDS).logits)
    assert separate.num_parameters() == stacked.num_parameters()


@each_mixture
def test_gradients_are_those_of_stacked_experts(kind: str) -> None:
    stacked, separate = stock(kind).double(), stock(kind).double()
    separate_projections(separate)
    for model in (stacked, separate):
        model(IDS).logits.log_softmax(-1)[..., 5].sum().backward()
    for one, other in zip(stacked.model.layers, separate.model.layers, strict=True):
        assert torch.allclose(one.mlp.gate.weight.grad, other.mlp.gate.weight.grad)
        for index, expert in enumerate(other.mlp.experts):
            both = torch.cat([expert.gate_proj.weight.grad, expert.up_proj.weight.grad])
            assert torch.allclose(one.mlp.experts.gate_up_proj.grad[index], both)
            assert torch.allclose(one.mlp.experts.down_proj.grad[index], expert.down_proj.weight.grad)
    lone = separate.model.layers[0].mlp.experts
    summed = lone(torch.ones(1, tiny.HIDDEN).double(), torch.tensor([[0, 1]]), torch.ones(1, 2).double())
    summed.sum().backward()
    assert all(expert.up_proj.weight.grad is not None for expert in lone)  # also those without a token


@each_mixture
def test_every_matrix_of_every_expert_is_named_once(kind: str) -> None:
    shape = ModelShape(**tiny.shape(kind))
    found = {
        name: tuple(module.weight.shape)
        for name, module in tiny.model(kind).named_modules()
        if isinstance(module, torch.nn.Linear) and name != "lm_head"
    }
    assert {m.name: (m.out_features, m.in_features) for m in linear_modules(shape)} == found
    types = family_for(shape).types
    assert len({linear.key for linear in types}) == len(types) == 4 + 3 * 4
    assert list(dict.fromkeys(linear.name for linear in types)) == [t.name for t in FAMILIES[shape.family].types]


@each_mixture
def test_a_dense_checkpoint_is_stored_as_transformers_stores_it(kind: str, tmp_path: Path) -> None:
    tiny.tokenizer().save_pretrained(tmp_path / "tokenizer")
    stock(kind).save_pretrained(tmp_path / "theirs")
    save_checkpoint(tiny.model(kind), tmp_path / "tokenizer", tmp_path / "ours")
    ours, theirs = (load_file(tmp_path / name / "model.safetensors") for name in ("ours", "theirs"))
    assert sorted(ours) == sorted(theirs)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert torch.equal(load_checkpoint(tmp_path / "theirs", torch.float32)(IDS).logits, tiny.model(kind)(IDS).logits)


@each_mixture
@pytest.mark.parametrize("identity", [False, True])
def test_multiplied_out_it_is_a_model_of_transformers(kind: str, identity: bool, tmp_path: Path) -> None:
    model = with_pairs(kind, identity=identity)
    (tmp_path / "dense").mkdir()
    found = stock_model(model)
    write_stock(found, tmp_path / "dense")
    opened = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    assert type(opened) is type(stock(kind))
    assert torch.allclose(opened(IDS).logits, model(IDS).logits, atol=1e-5)
    assert not torch.allclose(model(IDS).logits, tiny.model(kind)(IDS).logits, atol=1e-2)
    assert found.zeros == 0
    assert found.parameters == opened.num_parameters()


def test_what_other_tools_have_no_place_for_is_named(tmp_path: Path) -> None:
    with pytest.raises(RankwiseError, match=r"q_proj: compression gave it a bias.*`qwen3_moe` has no place"):
        stock_model(with_pairs("qwen3_moe", bias=True))
    with pytest.raises(RankwiseError, match=r"no GGUF file is written of `mixtral`"):
        write_gguf(tiny.model("mixtral"), tmp_path, tmp_path / "model.gguf")


@each_mixture
def test_parameters_are_those_of_all_experts(kind: str) -> None:
    budget = Budget.of(ModelShape(**tiny.shape(kind)))
    ranks = {m.name: rank_for(0.5, m.out_features, m.in_features) for m in budget.modules if m.type.expert != 3}
    model, before = tiny.model(kind), tiny.model(kind).num_parameters()
    pairs = {
        name: LowRankFactors(torch.randn(rank, model.get_submodule(name).in_features), torch.randn(m, rank))
        for name, rank in ranks.items()
        if rank is not None and (m := model.get_submodule(name).out_features)
    }
    replace_modules(model, pairs)
    without_biases = Budget(budget.dimensions, budget.modules, adds_bias=False)
    counts = count_parameters(model, budget.dimensions)
    assert counts["decoder_linears"] == without_biases.parameters(ranks)
    assert before - model.num_parameters() == budget.dense_parameters - without_biases.parameters(ranks)


@each_mixture
def test_a_random_model_is_made_and_passes_the_checks(kind: str, tmp_path: Path) -> None:
    tiny.tokenizer().save_pretrained(tmp_path / "tokenizer")
    source = {"random": 3, "tokenizer": "another"}
    section = Model(source=source, shape=ModelShape(**tiny.shape(kind)), max_length=64)
    folder = tmp_path / "model"
    folder.mkdir()
    make_random_checkpoint(section, 3, tmp_path / "tokenizer", folder)
    files = sorted(folder.glob("*.safetensors"))
    parameters = check_checkpoint("x", section, folder, files)
    assert parameters == load_checkpoint(folder, torch.float32).num_parameters()
    section.shape.__dict__["experts"] = 5
    with pytest.raises(RankwiseError, match=r"models\.x\.shape\.experts: the config says 5, the model has 4"):
        check_checkpoint("x", section, folder, files)


def test_a_stored_expert_that_is_missing_damaged_or_too_many_is_named(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    tiny.tokenizer().save_pretrained(tmp_path)
    stock("mixtral").save_pretrained(tmp_path)
    section = Model(source={"path": str(tmp_path)}, shape=ModelShape(**tiny.shape("mixtral")), max_length=64)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    name = "model.layers.1.block_sparse_moe.experts.2.w3.weight"
    check_checkpoint("x", section, tmp_path, [file])
    save_file(tensors | {name: tensors[name] * np.nan}, file, metadata={"format": "pt"})
    with pytest.raises(RankwiseError, match=rf"{name} holds NaN"):
        check_checkpoint("x", section, tmp_path, [file])
    another = name.replace("experts.2", "experts.4")
    save_file(tensors | {another: tensors[name].clone()}, file, metadata={"format": "pt"})
    with pytest.raises(RankwiseError, match=rf"{another} is none of the model's weights"):
        check_checkpoint("x", section, tmp_path, [file])
    del tensors[name]
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(RankwiseError, match=rf"{name} is not stored"):
        check_checkpoint("x", section, tmp_path, [file])


def test_impossible_numbers_of_experts_are_refused() -> None:
    shape = tiny.shape("qwen3_moe")
    for wrong in ({"experts": 0}, {"experts_per_token": 0}, {"experts_per_token": 5}):
        with pytest.raises(ValidationError, match="a token passes at least one of them and at most all"):
            ModelShape(**shape | wrong)
    with pytest.raises(ValidationError, match="models of family 'llama' have no experts; leave it out"):
        ModelShape(**tiny.shape("llama") | {"experts": 4})


@pytest.mark.parametrize("more", [{"mlp_only_layers": [1]}, {"decoder_sparse_step": 2}])
def test_blocks_with_and_without_experts_in_one_model_are_refused(more: dict[str, Any]) -> None:
    config = tiny.model("qwen3_moe").config.to_dict()
    assert shape_numbers(config) == tiny.shape("qwen3_moe")
    with pytest.raises(RankwiseError, match=r"some of its blocks have experts and others one MLP"):
        shape_numbers(config | more)
