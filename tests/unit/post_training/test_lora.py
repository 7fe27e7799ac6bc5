"""LoRA: where it goes, what it computes, its exact merge, and the two stages of SVD-LLM through the whole job.

Its training loop is tested with that of the other kind, in test_post_training_train.py.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import nn
from transformers import PreTrainedModel

from lowrank.config.tuning import LoraTuning, ScaledSubspaceTuning, parse_tuning
from lowrank.errors import RankwiseError
from lowrank.files import read_json
from lowrank.jobs.crew import Crew
from lowrank.model.checkpoint import family_of, load_checkpoint, recipe_of, replace_modules
from lowrank.model.factors import LowRankFactors
from lowrank.model.modeling_rankwise import IdentityBlockLinear, LowRankLinear
from lowrank.model.replacements import SmallerLinear
from lowrank.post_training.adapters import learnt_by, merge, stages_of, trained_numbers
from lowrank.post_training.job import Progress, joined
from lowrank.post_training.lora import LoraMatrices, attach_lora, learnt_matrices, merge_lora, target_weights
from lowrank.post_training.subspace import pack_vectors
from lowrank.post_training.tune import tune_checkpoint
from tests import tiny
from tests.unit.methods import test_slicegpt
from tests.unit.model import factor_samples
from tests.unit.post_training.post_training_samples import REPOSITORY, SUBJECT, save_tiny_model, write_manifest
from tests.unit.post_training.test_launch import ON_CPU, a_tokenizer

IDS = torch.randint(2, 400, (2, 12), generator=torch.Generator().manual_seed(0))
DENSE = ("v", "k")


def a_tuning(**changes: Any) -> LoraTuning:
    return LoraTuning.model_validate({"kind": "lora", "instructions": "a", **changes})


def a_model(kind: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A tiny model with pairs of rank 8, but dense k and v, and in block 1 a smaller MLP, as pruning leaves it."""
    model = tiny.model(kind).to(dtype)
    family = family_of(model)
    generator = torch.Generator().manual_seed(1)
    changed: dict[str, LowRankFactors | SmallerLinear] = {}
    for layer in range(tiny.LAYERS):
        for linear in family.types:
            name = f"{family.blocks}.{layer}.{linear.path}"
            dense: Any = model.get_submodule(name)
            m, n = dense.weight.shape
            if layer and linear.site == "mlp":
                changed[name] = SmallerLinear(dense.weight[:40], None if dense.bias is None else dense.bias[:40])
            elif layer and linear.site == "mlp_output":
                changed[name] = SmallerLinear(dense.weight[:, :40], dense.bias)
            elif linear.name not in DENSE:
                down, up = (torch.randn(size, generator=generator) / 8 for size in ((8, n), (m, 8)))
                changed[name] = LowRankFactors(down, up, dense.bias)
    replace_modules(model, changed)
    return model


def moved(wrapped: dict[str, nn.Module], seed: int = 3) -> None:
    """Matrices as after some training."""
    generator = torch.Generator().manual_seed(seed)
    for layer in wrapped.values():
        for parameter in layer.parameters():
            if parameter.requires_grad:
                parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator).to(parameter)


@settings(max_examples=30, deadline=None)
@given(
    n=st.integers(1, 9), m=st.integers(1, 9), rank=st.integers(1, 5), alpha=st.floats(0.5, 40), pair=st.booleans(),
    seed=st.integers(0, 99),
)  # fmt: skip
def test_forward_is_the_formula_and_the_merge_is_exact(
    n: int, m: int, rank: int, alpha: float, pair: bool, seed: int
) -> None:
    torch.manual_seed(seed)
    model = tiny.model("llama").double()
    layer = LowRankLinear(n, m, 4, bias=True) if pair else nn.Linear(n, m)
    model.model.layers[0].mlp.up_proj = layer.double().requires_grad_(False)
    tuning = a_tuning(rank=rank, alpha=alpha, dropout=0.5, targets=["up"])
    wrapped = attach_lora(model, tuning, "all", seed)
    moved(wrapped, seed)
    learnt = {name: learnt_by(wrapper) for name, wrapper in wrapped.items()}
    mine = {name.removeprefix("model.layers.0.mlp.up_proj"): v for name, v in learnt.items() if "layers.0" in name}

    def updated(weight: torch.Tensor, part: str) -> torch.Tensor:
        found = mine[part]
        assert isinstance(found, LoraMatrices)
        assert found.a.shape == (rank, weight.shape[1])
        assert found.b.shape == (weight.shape[0], rank)
        return weight + alpha / rank * found.b @ found.a

    x = torch.randn(3, 5, n, dtype=torch.float64)
    current: Any = model.model.layers[0].mlp.up_proj
    if pair:
        down, up = (updated(getattr(layer, part).base_layer.weight, f".{part}") for part in ("down", "up"))
        expected = x @ (up @ down).T + layer.up.base_layer.bias
    else:
        expected = x @ updated(layer.weight, "").T + layer.bias
    torch.testing.assert_close(current.eval()(x), expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("stage", ["all", "up", "down"])
@pytest.mark.parametrize("kind", tiny.FEW)
def test_logits_with_adapters_are_those_after_the_merge(kind: str, stage: Any) -> None:
    model, merged = a_model(kind), a_model(kind)
    before = model(IDS).logits
    tuning = a_tuning(dropout=0.3, stages=[stage])
    wrapped = attach_lora(model, tuning, stage, seed=0)
    torch.testing.assert_close(model(IDS).logits, before, rtol=0, atol=1e-6)  # training starts where compression ended
    moved(wrapped)
    with_adapters = model(IDS).logits
    assert (with_adapters - before).abs().max() > 0.01
    tensors = pack_vectors({name: learnt_by(layer) for name, layer in wrapped.items()})
    recipe = recipe_of(merged)
    merge(merged, tuning, tensors)
    torch.testing.assert_close(merged(IDS).logits, with_adapters, rtol=0, atol=1e-5)
    assert recipe_of(merged) == recipe  # ranks and shapes are what they were

    for layer in wrapped.values():
        layer.merge()  # type: ignore[operator]  # peft's own
    torch.testing.assert_close(model(IDS).logits, with_adapters, rtol=0, atol=1e-5)


def test_pairs_with_an_identity_block_are_trained_and_keep_it() -> None:
    def made() -> PreTrainedModel:
        model = tiny.model("llama")
        torch.manual_seed(3)
        for block, rank in zip(model.model.layers, (5, tiny.INTERMEDIATE), strict=True):
            block.mlp.up_proj = IdentityBlockLinear(tiny.HIDDEN, tiny.INTERMEDIATE, rank, bias=True)
            block.mlp.up_proj.rows = torch.randperm(tiny.INTERMEDIATE)[:rank].sort().values.int()
        return model.requires_grad_(False)

    model, merged, tuning = made(), made(), a_tuning(targets=["up"])
    wrapped = attach_lora(model, tuning, "all", seed=0)
    up = "mlp.up_proj"  # the second has no outputs but those of its first factor
    assert list(wrapped) == [f"model.layers.{path}" for path in (f"0.{up}.down", f"0.{up}.rest", f"1.{up}.down")]
    moved(wrapped)
    merge(merged, tuning, pack_vectors({name: learnt_by(layer) for name, layer in wrapped.items()}))
    torch.testing.assert_close(merged(IDS).logits, model(IDS).logits, rtol=0, atol=1e-5)
    assert (merged(IDS).logits - made()(IDS).logits).abs().max() > 0.01


@pytest.mark.parametrize("method", ["skipcat", "basis-sharing"])
def test_a_shared_factor_is_trained_once_for_all_that_share_it(method: str) -> None:
    model, _ = factor_samples.compressed(method, "llama-gqa", 30, model=tiny.model("llama-gqa").double())
    plain = copy.deepcopy(model)
    wrapped = attach_lora(model, a_tuning(rank=2), "all", seed=0)
    layers = {name.rpartition(".layers.")[2] for name in wrapped}
    first = "down.rest" if method == "skipcat" else "down"
    assert {f"0.mlp.gate_proj.{first}", "0.mlp.gate_proj.up", "0.mlp.up_proj.up"} <= layers
    shared = ("0.mlp.up_proj", "1.mlp.up_proj") if method == "skipcat" else ("1.mlp.gate_proj", "1.mlp.up_proj")
    assert not {f"{name}.{first}" for name in shared} & layers
    before = model(IDS).logits
    assert torch.allclose(before, plain(IDS).logits, atol=1e-12)
    moved(wrapped)
    moving = model(IDS).logits
    assert not torch.allclose(moving, before, atol=1e-3)
    merge_lora(plain, {name: learnt_matrices(layer) for name, layer in wrapped.items()}, 16 / 2)
    assert torch.allclose(plain(IDS).logits, moving, atol=1e-9)


def test_a_sliced_model_is_trained_like_any_other_and_keeps_its_shortcuts() -> None:
    model, merged = (test_slicegpt.sliced(tiny.model("qwen2"), "qwen2") for _ in range(2))
    tuning = a_tuning()
    wrapped = attach_lora(model, tuning, "all", seed=0)
    assert len(wrapped) == 7 * tiny.LAYERS
    assert not any("shortcut" in name for name in wrapped)
    moved(wrapped)
    merge(merged, tuning, pack_vectors({name: learnt_by(layer) for name, layer in wrapped.items()}))
    torch.testing.assert_close(merged(IDS).logits, model(IDS).logits, rtol=0, atol=1e-5)


def test_the_merge_is_rounded_once() -> None:
    torch.manual_seed(0)
    weight = torch.randn(6, 5).bfloat16()
    layer = nn.Linear(5, 6, bias=False)
    layer.weight = nn.Parameter(weight.clone(), requires_grad=False)
    learnt = LoraMatrices(torch.randn(3, 5), torch.randn(6, 3))
    merge_lora(nn.Sequential(layer), {"0": learnt}, scale=2.0)
    exact = weight.double() + 2.0 * learnt.b.double() @ learnt.a.double()
    assert torch.equal(layer.weight, exact.to(torch.bfloat16))


def test_all_linear_layers_of_the_blocks_are_targets_and_nothing_else() -> None:
    names = list(target_weights(a_model("llama"), None, "all"))
    attention = [f"self_attn.{name}" for name in
                 ("q_proj.down", "q_proj.up", "k_proj", "v_proj", "o_proj.down", "o_proj.up")]  # fmt: skip
    mlp = [f"mlp.{name}_proj.{part}" for name in ("gate", "up", "down") for part in ("down", "up")]
    assert names[:12] == [f"model.layers.0.{path}" for path in (*attention, *mlp)]
    assert names[12:] == [
        f"model.layers.1.{path}" for path in (*attention, "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
    ]
    ups = list(target_weights(a_model("llama"), None, "up"))
    assert ups == [name for name in names if name.endswith(".up")]
    some = list(target_weights(a_model("opt"), ["q", "fc2"], "all"))
    assert some == [
        *(f"model.decoder.layers.0.{path}.{part}" for path in ("self_attn.q_proj", "fc2") for part in ("down", "up")),
        *(f"model.decoder.layers.1.self_attn.q_proj.{part}" for part in ("down", "up")),
        "model.decoder.layers.1.fc2",
    ]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_only_the_matrices_are_trained_and_never_in_half_precision(dtype: torch.dtype) -> None:
    model = a_model("mistral", dtype)
    frozen = {name for name, _ in model.named_parameters()}
    wrapped = attach_lora(model, a_tuning(rank=3), "all", seed=0)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert len(trained) == 2 * len(wrapped) == len(list(model.parameters())) - len(frozen)
    assert all("lora_" in name for name in trained)
    assert {p.dtype for p in trained.values()} == {torch.promote_types(dtype, torch.float32)}
    shapes = [p.shape for name, p in model.named_parameters() if ".base_layer.weight" in name]
    tensors = pack_vectors({name: learnt_by(layer) for name, layer in wrapped.items()})
    assert trained_numbers(tensors) == sum(p.numel() for p in trained.values()) == sum(3 * (m + n) for m, n in shapes)
    loss = model(IDS).logits.float().square().mean()
    loss.backward()
    moving = [p for name, p in trained.items() if "lora_B" in name]
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in moving)


def test_the_start_follows_the_seed_and_nothing_else() -> None:
    torch.manual_seed(1)
    first = attach_lora(a_model("llama"), a_tuning(), "all", seed=7)
    torch.manual_seed(2)
    same, other = (attach_lora(a_model("llama"), a_tuning(), "all", seed) for seed in (7, 8))
    a, b, c = (pack_vectors({n: learnt_by(layer) for n, layer in found.items()}) for found in (first, same, other))
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert all(not torch.equal(a[name], c[name]) for name in a if name.endswith(":a"))
    assert not any(tensor.any() for name, tensor in a.items() if name.endswith(":b"))


def test_dropout_is_in_training_only() -> None:
    model = a_model("llama")
    wrapped = attach_lora(model, a_tuning(dropout=0.5), "all", seed=0)
    moved(wrapped)
    assert torch.equal(model(IDS).logits, model(IDS).logits)
    for layer in wrapped.values():
        layer.train()
    assert not torch.equal(model(IDS).logits, model(IDS).logits)


def test_a_layer_without_channels_has_nothing_to_train() -> None:
    """Pruning may take all heads of a block; the layer that is left is its bias."""
    model = tiny.model("llama")
    empty = SmallerLinear(torch.zeros(tiny.HIDDEN, 0), torch.ones(tiny.HIDDEN))
    replace_modules(model, {"model.layers.0.self_attn.o_proj": empty})
    names = list(target_weights(model, ["o"], "all"))
    assert names == ["model.layers.1.self_attn.o_proj"]


def test_wrong_targets_and_stages_are_named() -> None:
    with pytest.raises(RankwiseError, match=r"family 'opt' has no linear layers of type gate; it has q, k, v, o, fc1"):
        attach_lora(a_model("opt"), a_tuning(targets=["q", "gate"]), "all", seed=0)
    with pytest.raises(RankwiseError, match="stage `up` of this tuning finds nothing to train: none of its layers"):
        attach_lora(tiny.model("llama"), a_tuning(), "up", seed=0)
    model = tiny.model("llama")
    model.model.layers[1].mlp.gate_proj = nn.Identity()
    with pytest.raises(RankwiseError, match=r"model.layers.1.mlp.gate_proj: .* is a Identity.*'gate'"):
        attach_lora(model, a_tuning(), "all", seed=0)


def test_the_kinds_of_tuning_are_told_apart_and_read_back() -> None:
    lora = parse_tuning({"kind": "lora", "instructions": "a"})
    assert isinstance(lora, LoraTuning)
    assert (lora.rank, lora.alpha, lora.dropout, lora.learning_rate) == (8, 16, 0.05, 1e-4)
    assert (lora.batch_size, lora.epochs, lora.warmup_steps, lora.max_length) == (64, 2, 100, 256)
    assert stages_of(lora) == ["all"]
    two = a_tuning(stages=["up", "down"], targets=["q"])
    assert parse_tuning(two.plain()) == two
    scales = parse_tuning({"kind": "scaled-subspace", "instructions": "a"})
    assert isinstance(scales, ScaledSubspaceTuning)
    assert len(stages_of(scales)) == 1
    for wrong in ({"instructions": "a"}, {"kind": "lora", "instructions": "a", "subspace": "top"},
                  {"kind": "lora", "instructions": "a", "stages": []}, {"kind": "lora", "instructions": "a",
                   "stages": ["up", "up"]}, {"kind": "lora", "instructions": "a", "batch_size": 9}):  # fmt: skip
        with pytest.raises(ValidationError):
            parse_tuning(wrong)


def test_progress_of_stages_is_joined_step_by_step() -> None:
    first = Progress(2, [(1, 3.0), (2, 2.5)], [(0, 3.1), (1, 2.2), (2, 2.4)], best=1, seconds=4.0)
    second = Progress(1, [(1, 2.1)], [(0, 2.2), (1, 2.0)], best=1, seconds=3.0)
    whole = joined([first, second])
    assert whole == Progress(
        3, [(1, 3.0), (2, 2.5), (3, 2.1)], [(0, 3.1), (1, 2.2), (2, 2.4), (2, 2.2), (3, 2.0)], best=3, seconds=7.0
    )
    assert joined([first]) == first


@ON_CPU
def test_two_stages_train_one_factor_each_and_write_one_merged_checkpoint(tmp_path: Path) -> None:
    source = save_tiny_model(tmp_path / "source")
    a_tokenizer(source)
    words = ["alpha", "beta", "gamma", "delta"]
    rows = [{"instruction": "say", "output": " ".join(words[i % 4 :])} for i in range(24)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    write_manifest(tmp_path / "manifest.json")
    tuning = a_tuning(
        stages=["up", "down"], rank=4, alpha=8, learning_rate=0.05, steps=4, batch_size=8, micro_batch_size=4,
        warmup_steps=1, validation_examples=6, evaluate_every=2, dtype="float32", max_length=300,
    )  # fmt: skip
    settings = {
        "tuning": tuning.plain(), "subject": SUBJECT, "dtype": "float32", "code": "abc",
        "deepspeed": json.loads((REPOSITORY / "config/deepspeed/zero2.json").read_text()),
        "state": str(tmp_path / "state"),
    }  # fmt: skip
    tune_checkpoint(
        source, tmp_path / "manifest.json", tmp_path / "rows.jsonl",
        tmp_path / "tuned", tmp_path / "tuned.json", settings, threads=1, crew=Crew(),
    )  # fmt: skip

    before, after = (load_checkpoint(folder, torch.float32) for folder in (source, tmp_path / "tuned"))
    assert recipe_of(after) == recipe_of(before)
    changed = {name for name, p in after.named_parameters() if not torch.equal(p, before.get_parameter(name))}
    pairs = {name for name, module in before.named_modules() if isinstance(module, LowRankLinear)}
    assert changed == {f"{name}.{part}.weight" for name in pairs for part in ("up", "down")}
    for name in changed:  # an update has the rank of its matrices
        update = after.get_parameter(name) - before.get_parameter(name)
        assert torch.linalg.matrix_rank(update, atol=1e-5) <= 4

    training = read_json(tmp_path / "tuned.json")["training"]
    assert training["steps"] == 8
    assert [step for step, _ in training["loss"]] == list(range(1, 9))
    steps, losses = zip(*training["validation"], strict=True)
    assert steps == (0, 2, 4, 4, 6, 8)
    assert losses[3] == pytest.approx(min(losses[1:3]), abs=1e-5)  # the second stage starts at the best of the first
    assert min(losses[4:]) < losses[0]
    assert training["best_step"] in (6, 8)
    sizes = [tuple(before.get_parameter(name).shape) for name in changed]
    assert training["trainable"] == sum(4 * (m + n) for m, n in sizes)
    assert training["trainable_share"] == training["trainable"] / sum(p.numel() for p in after.parameters())
    assert not list((tmp_path / "state").iterdir())
